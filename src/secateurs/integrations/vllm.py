"""vLLM runs compressed folders, on the CPU: for it they are a quantisation method that it did not know.

It finds this file by the entry point `vllm.general_plugins`, in each of its processes. It fuses layers that
share an input (q, k and v; gate and up), and shares rows or columns out among ranks. What a rank has of a
fused layer is joined where values are of one kind, and multiplied by in one go; else part by part, of which
some may be dense. A packed embedding or head is expanded as it is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from secateurs.runtime.format import row_offsets
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.layout import ExpertsLayout, Layout
from secateurs.runtime.linear import SparseLinear
from secateurs.runtime.quantizer import METHOD, SecateursConfig
from secateurs.runtime.shards import Packed, join_rows, share, take_columns, take_rows, without_experts

QKV = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a fused attention."""

INSTEAD = "write the dense folder with `secateurs decompress`, and give vLLM that"


def register() -> None:
    """What the entry point calls."""
    register_quantization_config(METHOD)(CompressedConfig)


class CompressedConfig(QuantizationConfig):
    """What is packed of a model.

    Args:
        layers: layouts by the names of linear modules: transformers', until a model of vLLM's says what it
            calls them.

    Raises:
        ValueError: vLLM does not run on a CPU here, or experts are packed.
    """

    def __init__(self, layers: Mapping[str, Layout | ExpertsLayout]) -> None:
        super().__init__()
        if not current_platform.is_cpu():
            raise ValueError(f"compressed folders run in vLLM on CPUs only, so far: {INSTEAD}")
        self.layers = without_experts(layers)
        self.found: set[str] = set()
        """Names of `layers` that the model has."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressedConfig":
        """Of config.json's `quantization_config`; ValueError as `SecateursConfig`."""
        return cls(SecateursConfig.from_dict(config).layers)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # asked of GPUs only

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of vLLM's holds its weights; None leaves that to vLLM.

        Raises:
            ValueError: it is packed, and neither a linear layer of vLLM's, nor an embedding or a head.
        """
        if isinstance(layer, VocabParallelEmbedding) and not prefix:  # Llama's is not told its name
            prefix = self._table(layer.org_vocab_size, layer.embedding_dim)
        layout = self.layers.get(prefix)
        if isinstance(layout, Layout) and isinstance(layer, VocabParallelEmbedding):
            self.found.add(prefix)
            return ExpandedTable(prefix, layout)
        if not isinstance(layer, LinearBase):
            if layout is not None:
                raise ValueError(f"vLLM cannot run '{prefix}' packed: {INSTEAD}")
            return None
        path, _, fused = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.layers and fused in self.packed_modules_mapping:
            names = [f"{path}.{name}".lstrip(".") for name in self.packed_modules_mapping[fused]]
        layouts = {name: self.layers[name] for name in names if name in self.layers}
        self.found |= layouts.keys()
        return PackedLinear(self, names, layouts) if layouts else UnquantizedLinearMethod()

    def _table(self, tokens: int, width: int) -> str:
        """The name of the packed embedding, if there is one."""
        named = (name for name, layout in self.layers.items() if layout.shape == (tokens, width))
        return next((name for name in named if not name.endswith("head")), "")

    def check_found(self) -> None:
        """Once the model is built.

        Raises:
            ValueError: something is packed that it does not have as a linear layer.
        """
        lost = sorted(self.layers.keys() - self.found)
        if lost and get_pp_group().world_size == 1:
            raise ValueError(f"vLLM has no linear layer '{lost[0]}', which is packed: {INSTEAD}")


class PackedLinear(LinearMethodBase):
    """How a linear layer of vLLM's holds weights of which some at least are packed, and multiplies by them.

    Args:
        config: of the model.
        names: of the weights that are fused in it, in the order of their rows; one where the files have them
            fused.
        layouts: of those that are packed.
    """

    def __init__(self, config: CompressedConfig, names: Sequence[str], layouts: dict[str, Layout]) -> None:
        self.config, self.names, self.layouts = config, names, layouts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Nothing yet but a place that vLLM brings weights to: how large they are shows when they come."""
        if len(self.names) not in (1, len(output_partition_sizes)):
            raise ValueError(f"vLLM fuses '{self.names[0]}' in a way that is not known here: {INSTEAD}")
        self.columns, self.rows, self.dtype = input_size_per_partition, output_partition_sizes, params_dtype
        self.parts: dict[int, list[Packed] | Tensor] = {}
        layer.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        # Where vLLM looks for what takes a weight: on the parameter, which torch's types do not know of.
        layer.weight.weight_loader = partial(self.load, layer)  # type: ignore[attr-defined]

    def load(
        self, layer: Any, parameter: Tensor, loaded: Tensor, shard: int | str | tuple[int, ...] | None = None
    ) -> None:
        """Takes this rank's part of a weight; vLLM calls it.

        Args:
            layer: that it is for.
            parameter: that stands for it.
            loaded: packed or dense, as in the file.
            shard: which of those that are fused; None where there is only one.

        Raises:
            ValueError: as `row_offsets`; or the sizes are not the model's.
        """
        self.config.check_found()
        index = 0 if shard is None else QKV.get(shard, shard) if isinstance(shard, str) else shard
        if not isinstance(index, int) or (shard is None) != (len(self.names) == 1):
            raise ValueError(f"vLLM fuses '{self.names[0]}' in a way that is not known here: {INSTEAD}")
        name = self.names[index]
        layout = self.layouts.get(name)
        rows, columns = loaded.shape if layout is None else layout.shape
        whole, own = [rows], [self.rows[index]]
        if len(self.names) == 1 < len(self.rows):
            whole, own = layer.output_sizes, self.rows
            if sum(whole) != rows:
                raise ValueError(f"'{name}' is fused, of fewer heads than there are ranks: take fewer ranks")
        taken = share(name, whole, own, layer.tp_rank, layer.tp_size)
        ((first, last),) = share(name, [columns], [self.columns], layer.tp_rank, layer.tp_size)
        if layout is None:
            kept = [loaded[a:b, first:last] for a, b in taken]
            self.parts[index] = torch.cat(kept).to(self.dtype)
            return
        offsets = row_offsets(name, loaded, layout)
        if last - first < columns:
            loaded, layout = take_columns(loaded, offsets, layout, first, last)
            offsets = row_offsets(name, loaded, layout)
        self.parts[index] = [take_rows(loaded, offsets, layout, a, b) for a, b in taken]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Puts what has the same form into one.

        Raises:
            ValueError: one of the weights did not come.
        """
        for index, name in enumerate(self.names):
            if index not in self.parts:
                raise ValueError(f"compressed layer '{name}' has no weight in the model's files")
        layer.parts = nn.ModuleList()
        parts = [self.parts[index] for index in range(len(self.names))]
        for _, neighbours in groupby(parts, key=type):
            pieces = list(neighbours)
            dense = [piece for piece in pieces if isinstance(piece, Tensor)]
            if dense:
                layer.parts.append(_dense(torch.cat(dense)))
            else:
                packed = [each for piece in pieces for each in piece]
                layer.parts.extend(_sparse(self.names[0], *each) for each in join_rows(packed))
        self.parts.clear()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, (..., rows), for x (..., columns)."""
        if len(layer.parts) == 1:
            return _product(layer.parts[0], x, bias)
        y = torch.cat([_product(part, x, None) for part in layer.parts], dim=-1)
        return y if bias is None else y + bias


class ExpandedTable(UnquantizedEmbeddingMethod):
    """How an embedding or a head of vLLM's holds a table that is packed in the files: dense.

    Args:
        name: of the table.
        layout: of what the files hold.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.name, self.layout = name, layout

    def create_weights(
        self, layer: nn.Module, *sizes: Any, weight_loader: Callable[[Tensor, Tensor], None], **others: Any
    ) -> None:
        """As vLLM does, which is then brought the expanded table."""

        def load(parameter: Tensor, loaded: Tensor) -> None:
            offsets = row_offsets(self.name, loaded, self.layout)
            weight_loader(parameter, expand(loaded, offsets, self.layout, 0, self.layout.rows))

        super().create_weights(layer, *sizes, weight_loader=load, **others)


def _sparse(name: str, packed: Tensor, layout: Layout) -> SparseLinear:
    with torch.device("meta"):
        layer = SparseLinear(layout, bias=False)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.count(name)
    return layer


def _dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _product(part: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(part, SparseLinear):
        return sparse_linear(x, part.weight, part.offsets, bias, part.layout)
    return linear(x, part.weight, bias)
