"""One token (or a few) through blocks of Llama-2-7B's geometry on a GPU: compressed against cuBLAS.

Both sides are captured in CUDA graphs over enough blocks that the weights exceed the second-level cache
several times over, and replayed in turns; medians over rounds. The bound is a device-to-device copy, which
reads and writes: half its bytes per second count as reads, twice over. With --semi-structured, 2:4 weights
through torch's tensor cores against dense, for batches and prefill.

    python benchmarks/decode_gpu.py
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from common import RESULTS, environment, save
from secateurs.runtime import gpu
from secateurs.runtime.format import mask_of, pack, row_offsets, values_of

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The kernels of one call, as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def paired_seconds(runs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median seconds of each graph, replayed in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 3):
        for name, graph in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_number >= 3:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def random_weight(rows: int, columns: int, sparsity: float) -> torch.Tensor:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    return weight.masked_fill_(torch.rand(rows, columns, device="cuda") < sparsity, 0)


def decode(sparsity: float, tokens: int, blocks: int, rounds: int) -> dict:
    x = {
        columns: torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
        for columns in (4096, 11008)
    }
    dense = [random_weight(*shape, sparsity) for _ in range(blocks) for shape in SHAPES]
    packed = []
    for weight in dense:
        data, layout = pack(weight)
        offsets = row_offsets("weight", data, layout).cuda()
        data = data.cuda()
        packed.append((mask_of(data, layout), values_of(data, layout), offsets))
    for weight, (mask, values, offsets) in zip(dense[:7], packed[:7], strict=True):
        ours, theirs = (
            gpu.linear(x[weight.shape[1]], mask, values, offsets, None),
            x[weight.shape[1]] @ weight.T,
        )
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0.5)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = paired_seconds(
        {
            "compressed": captured(
                lambda: [gpu.linear(x[w.shape[1]], *p, None) for w, p in zip(dense, packed, strict=True)]
            ),
            "dense": captured(lambda: [x[weight.shape[1]] @ weight.T for weight in dense]),
            "copy of 1 GiB": captured(lambda: target.copy_(source)),
        },
        rounds,
    )
    dense_bytes = sum(weight.nbytes for weight in dense)
    packed_bytes = sum(tensor.nbytes for layer in packed for tensor in layer)
    bandwidth = 2 * source.nbytes / seconds["copy of 1 GiB"]
    return {
        "sparsity": sparsity,
        "tokens": tokens,
        "speedup": seconds["dense"] / seconds["compressed"],
        "bytes": {"compressed": packed_bytes, "dense": dense_bytes},
        "seconds": seconds,
        "share_of_bandwidth": {
            "compressed": packed_bytes / seconds["compressed"] / bandwidth,
            "dense": dense_bytes / seconds["dense"] / bandwidth,
        },
    }


def semi_structured(tokens: int, rounds: int) -> dict:
    """2:4 against dense, one block."""
    dense, sparse = [], []
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns // 4, 4, dtype=torch.bfloat16, device="cuda")
        weight.scatter_(2, weight.abs().topk(2, dim=2, largest=False).indices, 0)
        dense.append(weight.view(rows, columns))
        sparse.append(torch.sparse.to_sparse_semi_structured(dense[-1]))
    x = {
        columns: torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
        for columns in (4096, 11008)
    }
    linear = torch.nn.functional.linear
    seconds = paired_seconds(
        {
            "2:4": captured(lambda: [linear(x[w.shape[1]], w) for w in sparse]),
            "dense": captured(lambda: [linear(x[w.shape[1]], w) for w in dense]),
        },
        rounds,
    )
    return {
        "pattern": "2:4",
        "tokens": tokens,
        "speedup": seconds["dense"] / seconds["2:4"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--semi-structured", type=int, nargs="*", default=[16, 64, 512, 2048], help="tokens")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    torch.manual_seed(0)
    rows = []
    for sparsity in settings.sparsities:
        for tokens in settings.tokens:
            rows.append(decode(sparsity, tokens, settings.blocks, settings.rounds))
            print(rows[-1], flush=True)
    for tokens in settings.semi_structured:
        rows.append(semi_structured(tokens, settings.rounds))
        print(rows[-1], flush=True)
    save(RESULTS / "decode_gpu.json", environment() | vars(settings), rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
