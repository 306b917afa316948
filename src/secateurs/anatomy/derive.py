"""From a block's trace to its anatomy: what shares an input, what an MLP is made of, what adds to the stream.

Nothing is known by name. A product's input is asked what it was made of: what mixes tokens on the way feeds
an o; what goes channel by channel feeds a down; what multiplies its channel exactly is up, and what is left
of the channel is the gate's activation.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from secateurs.anatomy.dependence import factor_of, leaves_of, mixes_tokens, owners
from secateurs.anatomy.matrix import Matrix
from secateurs.anatomy.products import storage_of
from secateurs.anatomy.trace import AttentionCall, Product, Trace

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""What a matrix is in its block; a fused one has several, one that is none of these has none."""


@dataclass(frozen=True)
class MLP:
    """down(f(gate x) * up x), or down(f(up x))."""

    first: tuple[Matrix, ...]
    """Those that read x: gate and up, in this order; or one, up or both of them, gate's rows first."""
    down: Matrix
    gated: bool
    activation: str | None
    """f: the path of a module of the block, or a name of transformers' `ACT2FN`; None where it is neither."""


@dataclass(frozen=True)
class Heads:
    """The heads of a block's attention, and where they lie in its matrices."""

    count: int
    kv_count: int
    dim: int
    """Of a query head."""
    query_rows: Mapping[str, Tensor]
    """Of each matrix that makes queries, or gates what heads give, (rows,): the head that each row belongs
    to, or -1."""
    key_rows: Mapping[str, Tensor]
    """Of each matrix that makes keys and values, (rows,): the key-value head, or -1."""
    reader: str
    """The matrix that reads what the heads give."""
    columns: Tensor
    """(columns of the reader,): the head that each belongs to."""


@dataclass(frozen=True)
class BlockAnatomy:
    """What is inside a block."""

    groups: tuple[tuple[Matrix, ...], ...]
    """Matrices that share one input, in the order of the forward pass; without those in `dense`."""
    roles: Mapping[str, tuple[Role, ...]]
    """By a matrix's name."""
    mlps: tuple[MLP, ...]
    heads: Heads | None
    """None where transformers' attention interface is not used, or heads are not apart."""
    factors: Mapping[str, float]
    """For each matrix whose result is simply added to the stream: what it is multiplied by."""
    residual: bool
    """Whether the block's input goes into its result as it is."""
    adds: bool
    """Whether the block's result is its input, plus what these matrices give, and nothing else."""
    mixing: frozenset[str]
    """Parameters that tokens are mixed by: o's, and all that its input is made of."""
    dense: Mapping[str, str]
    """Parameters that hold matrices and are left as they are -> why."""
    routed: Mapping[str, float]
    """Of each parameter that holds experts: the share of them that a token goes to."""
    experts: tuple[Matrix, ...]
    """Of each parameter that holds experts, also of those in `dense`: the first one's matrix."""

    def reads_mixed(self, group: Iterable[Matrix]) -> bool:
        """Whether any of some matrices is an o."""
        return any("o" in self.roles.get(matrix.name, ()) for matrix in group)

    @property
    def alone(self) -> tuple[str, ...]:
        """Names of matrices that neither mix tokens nor are of an MLP whose activation is known."""
        mlps = [mlp for mlp in self.mlps if mlp.activation is not None]
        known = {matrix.name for mlp in mlps for matrix in (*mlp.first, mlp.down)}
        rest = (m for m in self.matrices.values() if m.weight not in self.mixing)
        return tuple(matrix.name for matrix in rest if matrix.name not in known)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """All of `groups`, by name."""
        return {matrix.name: matrix for group in self.groups for matrix in group}


def derive(trace: Trace, config: PretrainedConfig, shared: Collection[str] = ()) -> BlockAnatomy:
    """What a block is made of.

    Args:
        trace: of the block.
        config: of the text model: an activation that it names comes before others that do the same, and of
            the numbers of heads in it the largest says what is too few rows to be a projection.
        shared: parameters that are those of other blocks, too.
    """
    return _Reading(trace, config, shared).anatomy()


class _Reading:
    def __init__(self, trace: Trace, config: PretrainedConfig, shared: Collection[str]) -> None:
        self.trace, self.block, self.config, self.shared = trace, trace.block, config, shared
        self.products = _representatives(trace.products)
        self.counts = {product.matrix.weight: self._count(product.matrix) for product in self.products}
        self.of_leaf = {id(product.result): product for product in self.products}
        self.before = {
            id(product): [self.of_leaf[leaf] for leaf in leaves if leaf in self.of_leaf]
            for product, leaves in self._leaves()
        }
        self.roles: dict[str, list[Role]] = {}
        self.useful: set[str] = set()
        self.mlps: list[MLP] = []
        self.mixers: list[Product] = []

    def _count(self, matrix: Matrix) -> int | None:
        """How many experts a matrix's parameter holds; None if it is no expert's."""
        parameter = self.block.get_parameter(matrix.weight)
        if parameter.ndim == 2 and matrix.expert is None:
            return None
        return parameter.numel() // prod(matrix.shape)

    def _leaves(self) -> list[tuple[Product, dict[int, Tensor]]]:
        found = [(product, leaves_of(product.given)) for product in self.products]
        self.reads_stream = {id(p) for p, leaves in found if id(self.trace.given) in leaves}
        return found

    def anatomy(self) -> BlockAnatomy:
        written = leaves_of(self.trace.result)
        writers = [product for product in self.products if id(product.result) in written]
        factors = {}
        for product in writers:
            if (factor := factor_of(self.trace.result, product.result)) is not None:
                factors[product.matrix.name] = factor
        self.useful = self._useful([p for p in writers if self._is_wide(p)])
        for product in self.products:
            if (
                product.matrix.name in self.useful
                and self._before(product)
                and not self._reads_stream(product)
            ):
                self._inner(product)
        for call in self.trace.attention:
            self._name_attention(call)
        dense = self._dense()
        left = [writer for writer in writers if writer.matrix.weight in dense]
        residual = factor_of(self.trace.result, self.trace.given) == 1
        adds = residual and not left and all(writer.matrix.name in factors for writer in writers)
        return self._with_experts(dense, factors, residual, adds)

    def _before(self, product: Product) -> list[Product]:
        """The products that a product's input is made of."""
        return self.before[id(product)]

    def _reads_stream(self, product: Product) -> bool:
        return id(product) in self.reads_stream

    def _is_wide(self, product: Product) -> bool:
        """Whether a product may be added to the stream."""
        return product.result.shape[-1] == self.trace.given.shape[-1]

    def _useful(self, writers: list[Product]) -> set[str]:
        """Names of matrices whose results reach the stream as vectors, and not as mere weights of others."""
        useful, waiting = set[str](), list(writers)
        while waiting:
            product = waiting.pop()
            if product.matrix.name in useful:
                continue
            useful.add(product.matrix.name)
            # What is as wide as the stream may be added to it before it is read.
            waiting += [
                p for p in self._before(product) if not self._reads_stream(product) or self._is_wide(p)
            ]
        return useful

    def _inner(self, product: Product) -> None:
        """A matrix whose input is made of other products, and of the stream only through them."""
        before = self._before(product)
        if any(mixes_tokens(product.given, other.result) for other in before):
            self.mixers.append(product)
            self.roles.setdefault(product.matrix.name, ["o"])
            return
        parts = [part for other in before for part in _parts(product, other)]
        if parts and all(part.apart for part in parts):
            self._mlp(product, parts)

    def _mlp(self, down: Product, parts: list["_Part"]) -> None:
        gated = len(parts) == 2
        ups = [part for part in parts if part.linear]
        if len(parts) > 2 or (gated and len(ups) != 1):
            return
        up = ups[0] if gated else parts[0]
        gate = next((part for part in parts if part is not up), None) if gated else None
        if not gated and torch.equal(up.values, up.channels):
            return  # two matrices in a row: a low rank
        self.roles[down.matrix.name] = ["down"]
        ordered: list[Matrix] = []
        named: tuple[tuple[_Part | None, Role], ...] = ((gate, "gate"), (up, "up"))
        for part, role in named:
            if part is not None:
                self.roles.setdefault(part.source.matrix.name, []).append(role)
                if part.source.matrix not in ordered:
                    ordered.append(part.source.matrix)
        # Fused rows are taken as they are: gate's first, each half in the order of the channels.
        halves = len(ordered) == len(parts) or (
            gate is not None and gate.start == 0 and up.start == len(gate.values.T)
        )
        plain = all(part.ordered for part in parts) and halves
        driver = up if gate is None else gate
        wanted = driver.channels if gate is None else driver.channels / up.values
        activation = self._activation(down.matrix.name, driver.values, wanted) if plain else None
        self.mlps.append(MLP(tuple(ordered), down.matrix, gated, activation))

    def _activation(self, down: str, values: Tensor, wanted: Tensor) -> str | None:
        """What makes `wanted` of `values`, both (tokens, channels)."""
        usable = wanted.isfinite()
        owned = [
            (name, module)
            for name, module in self.block.named_modules()
            if not any(module.children()) and all(p.ndim < 2 for p in module.parameters())
        ]
        home = down.split(".")
        owned.sort(key=lambda entry: -_in_common(entry[0].split("."), home))  # the MLP's own first
        said = [
            str(value) for value in vars(self.config).values() if isinstance(value, str) and value in ACT2FN
        ]
        named = [(name, None) for name in dict.fromkeys([*said, *KNOWN])]
        for name, module in (*owned, *named):
            try:
                got = (ACT2FN[name] if module is None else module)(values)
            except Exception:  # a module that is no function of one tensor
                continue
            if isinstance(got, Tensor) and got.shape == wanted.shape:
                error = (got - wanted)[usable].abs()
                # A quotient by something near 0 tells little.
                if error.numel() and float(error.quantile(0.99)) < 3e-5 * max(1.0, float(values.abs().max())):
                    return name
        return None

    def _name_attention(self, call: AttentionCall) -> None:
        labels: tuple[tuple[Role, Tensor], ...] = (("q", call.query), ("k", call.key), ("v", call.value))
        for role, tensor in labels:
            for leaf in leaves_of(tensor):
                if leaf in self.of_leaf:
                    name = self.of_leaf[leaf].matrix.name
                    roles = self.roles.setdefault(name, [])
                    if role not in roles and not set(roles) - {"q", "k", "v"}:
                        roles.append(role)

    def _dense(self) -> dict[str, str]:
        """Parameter -> why it is left as it is."""
        heads = [v for k, v in vars(self.config).items() if "heads" in k and isinstance(v, int)]
        few = 2 * max(heads, default=0)
        why: dict[str, str] = {}
        seen: set[str] = set()
        for product in self.products:
            matrix, name = product.matrix, product.matrix.name
            seen.add(matrix.weight)
            if matrix.weight in self.shared:
                why[matrix.weight] = "shared between blocks"
            elif name.rpartition(".")[2] in STEERING:
                why[matrix.weight] = "steers a recurrence"
            elif name not in self.useful:
                why[matrix.weight] = "a router or gate: its results only weigh those of others"
            elif matrix.shape[0] <= few and name not in self.roles:
                why[matrix.weight] = "a gate or step for each head"
        whole = {matrix.weight for mlp in self.mlps for matrix in (*mlp.first, mlp.down)}
        rest = seen - whole - why.keys()
        homes = Counter(_home(weight) for weight in rest if self.counts[weight] is not None)
        for weight in rest:
            if homes[_home(weight)] == 1:
                why[weight] = "experts that are no MLPs"
        biases = {product.matrix.bias for product in self.products}
        for name, parameter in self.block.named_parameters():
            if parameter.ndim > 1 and name not in seen | biases and not name.endswith("bias"):
                multiplied = name in self.trace.real
                why[name] = "no matrix that is multiplied by" if multiplied else "not used on this text"
        return why

    def _with_experts(
        self, dense: Mapping[str, str], factors: Mapping[str, float], residual: bool, adds: bool
    ) -> BlockAnatomy:
        """The anatomy, with all experts where one stood for them."""
        groups: dict[Any, list[Matrix]] = {}
        for product in self.products:
            if product.matrix.weight in dense:
                continue
            given = product.given
            where = (storage_of(given), given.storage_offset(), given.numel(), given.shape[-1])
            group = groups.setdefault(where, [])
            if product.matrix not in group:
                group.append(product.matrix)
        numbers = {name: self._experts(name) for name in self.counts}

        def each(*matrices: Matrix) -> list[tuple[Matrix, ...]]:
            return [
                tuple(_expert(matrix, number) for matrix in matrices)
                for number in numbers[matrices[0].weight]
            ]

        every = tuple(group for matrices in groups.values() for group in each(*matrices))
        roles = {
            matrix.name: tuple(self.roles[product.matrix.name])
            for product in self.products
            if product.matrix.name in self.roles and product.matrix.weight not in dense
            for [matrix] in each(product.matrix)
        }
        mlps = tuple(
            replace(mlp, first=tuple(first), down=down)
            for mlp in self.mlps
            if not {matrix.weight for matrix in (*mlp.first, mlp.down)} & dense.keys()
            for *first, down in each(*mlp.first, mlp.down)
        )
        names = {matrix.name for group in every for matrix in group}
        return BlockAnatomy(
            groups=every,
            roles=roles,
            mlps=mlps,
            heads=self._heads(),
            factors={name: factor for name, factor in factors.items() if name in names},
            residual=residual,
            adds=adds,
            mixing=self._mixing(),
            dense=dense,
            routed=self._routed(),
            experts=tuple(_expert(p.matrix, 0) for p in self.products if self.counts[p.matrix.weight]),
        )

    def _routed(self) -> dict[str, float]:
        tokens = self.trace.given.numel() // self.trace.given.shape[-1]
        routed: dict[str, float] = {}
        for product in self.trace.products:
            name = product.matrix.weight
            if (count := self.counts[name]) is not None:
                given = product.given.numel() // product.given.shape[-1]
                routed[name] = routed.get(name, 0.0) + given / tokens / count
        return routed

    def _mixing(self) -> frozenset[str]:
        found, waiting = set[str](), list(self.mixers)
        while waiting:
            product = waiting.pop()
            if product.matrix.weight not in found:
                found.add(product.matrix.weight)
                waiting += self._before(product)
        return frozenset(found)

    def _experts(self, parameter: str) -> list[int | None]:
        """The numbers of the experts that a parameter holds: no more than all matrices of their MLP have."""
        count = self.counts[parameter]
        if count is None:
            return [None]
        for mlp in self.mlps:
            counts = {matrix.weight: self.counts[matrix.weight] for matrix in (*mlp.first, mlp.down)}
            if parameter in counts:
                count = min(count, *(other for other in counts.values() if other is not None))
        return list(range(count))

    def _heads(self) -> Heads | None:
        if len(self.trace.attention) != 1 or not self.mixers:
            return None
        [call] = self.trace.attention
        readers = [mixer for mixer in self.mixers if _computed_from(mixer.given, call.result)]
        if len(readers) != 1:
            return None
        [reader] = readers
        count, dim = call.query.shape[1], call.query.shape[-1]
        kv_count = call.key.shape[1]
        rows: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for tensor, heads, known in (
            (call.query, count, rows[0]),
            (call.key, kv_count, rows[1]),
            (call.value, kv_count, rows[1]),
        ):
            flat = tensor.transpose(1, 2).flatten(2)
            labels = torch.arange(heads).repeat_interleave(flat.shape[-1] // heads)
            for leaf in leaves_of(tensor):
                product = self.of_leaf.get(leaf)
                if product is None or id(product) not in self.reads_stream:
                    return None  # through a latent: its rows belong to no head
                found = owners(flat, product.result, labels)
                if not found.apart:
                    return None
                name = product.matrix.name
                known[name] = torch.maximum(known.get(name, found.part), found.part)
        width = reader.given.shape[-1]
        if width != count * call.value.shape[-1]:
            return None
        columns = self._columns(reader, call)
        if columns is None:
            return None
        for product in self._before(reader):
            name = product.matrix.name
            if name not in rows[1] and self._reads_stream(product):
                gated = owners(reader.given, product.result, columns)
                if gated.apart:
                    rows[0][name] = torch.maximum(rows[0].get(name, gated.part), gated.part)
        return Heads(count, kv_count, dim, *rows, reader.matrix.name, columns)

    def _columns(self, reader: Product, call: AttentionCall) -> Tensor | None:
        """Which head each column of the reader belongs to."""
        result, width = call.result, reader.given.shape[-1]
        found = owners(reader.given, result, torch.arange(width), width)
        if not found.apart or not torch.equal(found.part.sort().values, torch.arange(width)):
            return None
        columns = torch.empty_like(found.part)
        columns[found.part] = torch.arange(result.shape[2]).repeat_interleave(result.shape[3])
        return columns


STEERING = ("dt_proj", "x_proj", "f_a_proj", "f_b_proj")
"""Last parts of the names of matrices that steer a recurrence, where their rows alone do not show it."""

KNOWN = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh")
"""Activations to try where the block has no module for its own."""


@dataclass(eq=False)
class _Part:
    """Rows of a product of which there is one for each channel of another product's input."""

    source: Product
    apart: bool
    """Whether they are: if not, nothing else here says anything."""
    values: Tensor
    """(tokens, channels): what these rows give, in the order of the channels."""
    channels: Tensor
    """(tokens, channels)."""
    linear: bool
    """Whether a channel is proportional to its row."""
    ordered: bool
    """Whether the rows lie together, in the order of the channels."""
    start: int
    """The first row."""


def _parts(product: Product, source: Product) -> list[_Part]:
    """What rows of `source` each channel of `product`'s input is made of: a part for each row of a
    channel."""
    width = product.given.shape[-1]
    found = owners(product.given, source.result, torch.arange(width))
    rows = (found.part >= 0).nonzero().flatten()
    each, rest = divmod(len(rows), width)
    nothing = product.given.new_empty(0)
    if not found.apart or rest or not each or not (found.part[rows].bincount() == each).all():
        return [_Part(source, False, nothing, nothing, False, False, 0)]
    tokens = product.given.detach().reshape(-1, width)
    results = source.result.detach().reshape(-1, source.result.shape[-1])
    if len(tokens) != len(results):
        return [_Part(source, False, nothing, nothing, False, False, 0)]
    [slope] = torch.autograd.grad(
        product.given, source.result, torch.ones_like(product.given), retain_graph=True
    )
    slope = slope.reshape(results.shape)
    by_channel = rows[found.part[rows].argsort(stable=True)].view(width, each)
    parts = []
    for chosen in by_channel.T:
        expected = results[:, chosen] * slope[:, chosen]
        close = (expected - tokens).abs() <= 1e-5 * tokens.abs().max()
        ordered = bool((chosen.diff() == 1).all())
        linear = bool(close.float().mean() > 0.99)
        parts.append(_Part(source, True, results[:, chosen], tokens, linear, ordered, int(chosen[0])))
    return parts


def _home(parameter: str) -> str:
    """The module that a parameter is in."""
    return parameter.rpartition(".")[0]


def _in_common(one: list[str], other: list[str]) -> int:
    """How many parts two paths have in common from the start on."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _expert(matrix: Matrix, number: int | None) -> Matrix:
    """The same matrix of another expert."""
    if number is None:
        return matrix
    path, _, leaf = matrix.weight.rpartition(".")
    return replace(matrix, name=f"{path}.{number}.{leaf}".removeprefix("."), expert=number)


def _representatives(products: list[Product]) -> list[Product]:
    """One product for each parameter: of an expert's, that with the most tokens."""
    best: dict[str, Product] = {}
    for product in products:
        key = product.matrix.weight
        known = best.get(key)
        if known is None or product.given.numel() > known.given.numel():
            best[key] = product
    return [product for product in products if any(product is chosen for chosen in best.values())]


def _computed_from(tensor: Tensor, other: Tensor) -> bool:
    if not tensor.requires_grad:
        return False
    [gradient] = torch.autograd.grad(
        tensor, other, torch.ones_like(tensor), retain_graph=True, allow_unused=True
    )
    return gradient is not None
