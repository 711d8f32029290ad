"""Recordings of every known format, and files that are no recording."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import os
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeless_opt.problems.errors import FormatError, SolverUnavailableError
from moeless_opt.problems.io.recordings.read import Recording, read_loads, read_recording

LOADS = np.random.default_rng(1).integers(1, 1000, (6, 8)).astype(np.float64)
LOADS[:2] = 0  # two dense layers
STEPS = np.random.default_rng(2).integers(0, 50, (5, 6, 8))
STEPS[:, :2] = 0
PHYSICAL_MAP = np.stack([np.random.default_rng(i).permutation([*range(8), 0, 3, 3, 7]) for i in range(6)])


def write(path: Path, content: bytes | str | object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def is_the_loads(got: Recording, load_TLE: NDArray[Any] = LOADS) -> None:
    """Both dense layers left out, the rest as written."""
    expected = load_TLE if load_TLE.ndim == 3 else load_TLE[None]
    np.testing.assert_array_equal(got.load_TLE, expected[:, 2:])
    assert got.load_TLE.dtype == np.float64
    assert not got.load_TLE.flags.writeable
    assert got.layers == (2, 3, 4, 5)
    assert got.skipped == (0, 1)
    assert any("left out: 0, 1" in note for note in got.notes)


# --- formats -----------------------------------------------------------------------------------------------


def test_sglang_json(tmp_path: Path) -> None:
    got = read_recording(write(tmp_path / "a", {"logical_count": LOADS.tolist()}))
    is_the_loads(got)
    assert got.format == "sglang-json"
    assert got.scenarios == ()


def test_sglang_steps_are_summed_or_kept(tmp_path: Path) -> None:
    buffer = np.concatenate([STEPS, np.zeros_like(STEPS[:2])])  # a ring buffer that was not full
    path = write(tmp_path / "a.json", {"rank": 0, "logical_count": buffer.tolist(), "average": None})
    summed = read_recording(path)
    is_the_loads(summed, STEPS.sum(axis=0))
    assert "5 steps summed" in summed.notes
    kept = read_recording(path, steps="keep")
    is_the_loads(kept, STEPS)
    assert kept.scenarios == ("step 0", "step 1", "step 2", "step 3", "step 4")
    assert any("2 of 7 steps without any load dropped" in note for note in kept.notes)


@pytest.mark.parametrize("keys", [("logical_count",), ("counts",), ("something",)])
def test_json_by_known_name_or_as_the_only_array(tmp_path: Path, keys: tuple[str]) -> None:
    is_the_loads(read_recording(write(tmp_path / "a", {"model": "m", keys[0]: LOADS.tolist(), "top_k": 8})))


def test_bare_json_array(tmp_path: Path) -> None:
    got = read_recording(write(tmp_path / "a.txt", "\n  " + json.dumps(LOADS.tolist())))
    is_the_loads(got)
    assert got.format == "json"


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LOADS)
    for wrong in ("loads.json", "loads.csv", "loads.pt", "loads"):
        got = read_recording(write(tmp_path / wrong, (tmp_path / "a.npy").read_bytes()))
        is_the_loads(got)
        assert got.format == "npy"


@pytest.mark.parametrize("dtype", ["i4", ">i8", "u2", "f2", "f4", ">f8"])
def test_npy_of_every_number_type(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(LOADS.astype(dtype)))
    is_the_loads(read_recording(tmp_path / "a.npy"))


def test_a_third_axis_is_scenarios(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", STEPS)
    got = read_recording(tmp_path / "a.npy")
    is_the_loads(got, STEPS)
    is_the_loads(read_recording(tmp_path / "a.npy", scenario=3), STEPS[3])
    is_the_loads(read_recording(tmp_path / "a.npy", scenario="4"), STEPS[4])


def test_npz_with_named_workloads(tmp_path: Path) -> None:
    names = ["chat", "code", "maths", "long", "short"]
    path = npz(tmp_path / "a.npz", counts=STEPS, workloads=np.array(names), other=np.zeros((3, 4)))
    got = read_recording(path)
    is_the_loads(got, STEPS)
    assert got.scenarios == tuple(names)
    one = read_recording(path, scenario="maths")
    is_the_loads(one, STEPS[2])
    assert one.scenarios == ("maths",)
    with pytest.raises(FormatError, match="has no scenario 'poems'; it has chat, code, maths, long, short"):
        read_recording(path, scenario="poems")


def test_a_layer_idle_in_one_scenario_only_is_no_dense_layer(tmp_path: Path) -> None:
    load = np.ones((2, 3, 4))
    load[0, 1] = 0
    load[:, 2] = 0
    np.save(tmp_path / "a.npy", load)
    got = read_recording(tmp_path / "a.npy")
    assert (got.layers, got.skipped) == ((0, 1), (2,))


def test_several_arrays_ask_for_a_key(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", wiki=LOADS, code=LOADS * 2, pairs=np.ones((2, 8, 8)))
    with pytest.raises(
        FormatError, match=r"choose one by key: wiki \[6, 8\], code \[6, 8\], pairs \[2, 8, 8\]"
    ):
        read_recording(path)
    is_the_loads(read_recording(path, key="code"), LOADS * 2)
    with pytest.raises(FormatError, match="has no key 'poems'; it has wiki, code, pairs"):
        read_recording(path, key="poems")


def test_a_key_pattern_stacks_arrays_as_scenarios(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", moe_wiki=LOADS, moe_code=LOADS * 2, pairs=np.ones((2, 8, 8)))
    got = read_recording(path, key="moe_*")
    is_the_loads(got, np.stack([LOADS, LOADS * 2]))
    assert got.scenarios == ("moe_wiki", "moe_code")
    with pytest.raises(FormatError, match="has no key like 'q\\*'"):
        read_recording(path, key="q*")
    with pytest.raises(FormatError, match=r"pairs has shape \[2, 8, 8\]; arrays stacked by key='\*'"):
        read_recording(path, key="*")


def physical(load: NDArray[Any]) -> NDArray[Any]:
    """Spread logical loads unevenly over the slots of `PHYSICAL_MAP`, keeping every sum."""
    rng = np.random.default_rng(7)
    out = np.zeros((*load.shape[:-1], PHYSICAL_MAP.shape[1]))
    for layer in range(6):
        for expert in range(8):
            slots = np.flatnonzero(PHYSICAL_MAP[layer] == expert)
            total = load[..., layer, expert]
            part = np.floor(total * rng.random())
            out[..., layer, slots[0]] = total - part if len(slots) > 1 else total
            if len(slots) > 1:
                out[..., layer, slots[1]] = part
    return out


def test_vllm_physical_loads_sum_to_logical(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", expert_load_pass=physical(LOADS), physical_to_logical_map=PHYSICAL_MAP)
    got = read_recording(path)
    is_the_loads(got)
    assert got.format == "vllm-npz"
    halves = npz(
        tmp_path / "h.npz",
        expert_load_pass=physical(LOADS),
        physical_to_logical_map=PHYSICAL_MAP.astype(np.float16),
    )
    is_the_loads(read_recording(halves))
    document = {"expert_load_window": physical(STEPS).tolist(), "phy2log": PHYSICAL_MAP.tolist()}
    window = read_recording(write(tmp_path / "b", document))
    is_the_loads(window, STEPS.sum(axis=0))
    is_the_loads(read_recording(tmp_path / "b", steps="keep"), STEPS)


def test_one_map_for_all_layers_and_unused_slots(tmp_path: Path) -> None:
    document = {"expert_load_pass": [[1, 2, 4, 0], [8, 16, 32, 0]], "physical_to_logical_map": [0, 1, 0, -1]}
    got = read_recording(write(tmp_path / "a", document))
    assert got.load_TLE.tolist() == [[[5, 2], [40, 16]]]
    assert read_recording(tmp_path / "a", experts=4).load_TLE.shape == (1, 2, 4)
    with pytest.raises(FormatError, match="names expert 1; experts=1 allows 0 to 0"):
        read_recording(tmp_path / "a", experts=1)
    document["expert_load_pass"][1][3] = 1  # type: ignore[index]
    with pytest.raises(
        FormatError, match=r"layer 1 has load on a slot that physical_to_logical_map calls unused"
    ):
        read_recording(write(tmp_path / "b", document))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"expert_load_pass": [[1, 2]]},
            "the map to logical ones is missing; expected physical_to_logical_map",
        ),
        (
            {"expert_load_pass": [[1, 2]], "phy2log": [[0, 1, 2]]},
            r"phy2log has shape \[1, 3\], expert_load_pass needs \[1 layers, 2 slots\]",
        ),
        ({"expert_load_pass": [[1, 2]], "phy2log": [[0, 0.5]]}, "phy2log must hold logical experts from 0"),
        ({"expert_load_pass": [[1, 2]], "phy2log": [[0, -2]]}, "phy2log must hold logical experts from 0"),
        ({"expert_load_pass": [[1, 2]], "phy2log": [[0, 10**9]]}, "the loads would take over 256 MB"),
        ({"expert_load_pass": [[1, 2]], "phy2log": [[0, 1e30]]}, "phy2log must hold logical experts from 0"),
        (
            {"expert_load_pass": [[], []], "phy2log": [[], []]},
            r"expert_load_pass has shape \[2, 0\], must be",
        ),
        ({"expert_load_pass": [1, 2], "phy2log": [0, 1]}, r"expert_load_pass has shape \[2\], must be"),
    ],
)
def test_bad_physical_loads(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_recording(write(tmp_path / "a", document))


def test_token_trace_is_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    chosen = rng.random((500, 3, 8)).argsort(2)[:, :, :2].astype(np.uint8)
    got = read_recording(npz(tmp_path / "a.npz", experts=chosen, offsets=np.arange(10)), experts=9)
    expected = [[(chosen[:, layer] == e).sum() for e in range(9)] for layer in range(3)]
    assert got.load_TLE[0].tolist() == expected
    assert got.format == "token-trace"
    signed = chosen.astype(np.int32)
    signed[0] = -1
    got = read_recording(npz(tmp_path / "b.npz", topk_ids=signed))
    assert got.load_TLE.sum() == 499 * 3 * 2
    signed[1, 1, 0] = 1
    with pytest.raises(FormatError, match="names expert -7"):
        read_recording(npz(tmp_path / "c.npz", topk_ids=signed * 7))


# --- PyTorch -----------------------------------------------------------------------------------------------


def test_sglang_recorder_stat_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    content = {
        "rank": 0,
        "logical_count": torch.tensor(STEPS).int(),
        "average_utilization_rate_over_window": None,
    }
    for name, options in (("a.pt", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        torch.save(content, tmp_path / name, **options)
        got = read_recording(tmp_path / name)
        is_the_loads(got, STEPS.sum(axis=0))
        assert got.format == "sglang-torch"


def test_sglang_recorder_records_by_pass(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    records = [
        {
            "forward_pass_id": i,
            "rank": 3,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(physical(step)).int(),
            "topk_ids_of_layer": torch.zeros((6, 4, 8), dtype=torch.int32),
            "misc_objects": [],
        }
        for i, step in enumerate(STEPS)
    ]
    content = {"records": records, "last_physical_to_logical_map": torch.tensor(PHYSICAL_MAP)}
    torch.save(content, tmp_path / "a.pt")
    got = read_recording(tmp_path / "a.pt")
    is_the_loads(got, STEPS.sum(axis=0))
    assert got.format == "sglang-recorder"
    assert "5 forward passes of rank 3" in got.notes
    is_the_loads(read_recording(tmp_path / "a.pt", steps="keep"), STEPS)
    for change, message in (
        ({"records": []}, "holds no records"),
        ({"last_physical_to_logical_map": None}, "last_physical_to_logical_map is null"),
        ({"records": [{"rank": 0}]}, r"records\[0\] has no global_physical_count"),
        (
            {"records": [records[0], records[1] | {"global_physical_count": torch.zeros(6, 3)}]},
            r"records\[1\].global_physical_count has shape \[6, 3\], the first record's has \[6, 12\]",
        ),
    ):
        torch.save(content | change, tmp_path / "b.pt")
        with pytest.raises(FormatError, match=message):
            read_recording(tmp_path / "b.pt")


def test_torch_tensors_of_every_kind(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    small = torch.tensor(LOADS % 128)
    for tensor in (small, small.bfloat16(), small.half(), small.to(torch.uint8), small.t().contiguous().t()):
        torch.save(tensor, tmp_path / "a.pt")
        is_the_loads(read_recording(tmp_path / "a.pt"), LOADS % 128)
    for tensor, message in (
        (small.to_sparse(), "sparse"),
        (small.to(torch.complex64), "complex"),
        (small > 3, "has type bool, must be numbers"),
        (torch.zeros(1).expand(1 << 20, 1 << 20), r"has shape \[1048576, 1048576\], more than 256 MB"),
    ):
        torch.save(tensor, tmp_path / "a.pt")
        with pytest.raises(FormatError, match=message):
            read_recording(tmp_path / "a.pt")


class Trap:
    """Unpickling this would create the file named."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_no_pickle_is_ever_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    trap, sprung = Trap(tmp_path / "sprung"), tmp_path / "sprung"
    files: dict[str, str] = {}
    for protocol in (2, 3, 4, 5):
        write(tmp_path / f"p{protocol}", pickle.dumps({"logical_count": trap}, protocol=protocol))
        files[f"p{protocol}"] = "is a bare Python pickle, which could run code"
    torch.save({"logical_count": trap}, tmp_path / "new.pt")
    torch.save({"logical_count": trap}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    files |= dict.fromkeys(("new.pt", "old.pt"), "holds Python objects beside tensors")
    holder = np.empty((2, 2), dtype=object)
    holder[:] = trap
    np.save(tmp_path / "o.npy", holder, allow_pickle=True)
    np.savez(tmp_path / "o.npz", counts=holder)
    files |= dict.fromkeys(("o.npy", "o.npz"), "holds Python objects, which could run code")
    for name, message in files.items():
        with pytest.raises(FormatError, match=message):
            read_recording(tmp_path / name)
    assert not sprung.exists()
    pickle.loads((tmp_path / "p4").read_bytes())  # the trap works
    assert sprung.exists()


def test_missing_pytorch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.ones(2, 2), tmp_path / "a.pt")
    real = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(
        SolverUnavailableError, match=r"a\.pt: .*needs PyTorch: install moeless-opt\[runtime\]"
    ):
        read_recording(tmp_path / "a.pt")


# --- tables ------------------------------------------------------------------------------------------------


def long_rows(load: NDArray[Any], sep: str, first: int = 0) -> str:
    return "\n".join(f"{i + first}{sep}{e}{sep}{int(x)}" for (i, e), x in np.ndenumerate(load))


@pytest.mark.parametrize(
    ("header", "sep"),
    [
        ("layer,expert,count", ","),
        ("Layer ID;Expert Index;Token Count", ";"),
        ("layerIdx\texpertIdx\tnumTokens", "\t"),
        ("# written by hand\nlayer_id|expert_id|load", "|"),
        ("layer expert tokens", " "),
        ('"layer","expert","count"', ","),
    ],
)
def test_table_headers(tmp_path: Path, header: str, sep: str) -> None:
    got = read_recording(write(tmp_path / "a", f"{header}\n{long_rows(LOADS, sep)}\n\n"))
    is_the_loads(got)
    assert got.format == "csv"


def test_table_columns_in_any_order_with_others_between(tmp_path: Path) -> None:
    text = "expert,gate,count,layer\n" + "\n".join(
        f"{e},x,{x},model.layers.{i}.mlp" for (i, e), x in np.ndenumerate(LOADS)
    )
    is_the_loads(read_recording(write(tmp_path / "a", text)))


def test_table_without_header(tmp_path: Path) -> None:
    got = read_recording(write(tmp_path / "a", long_rows(LOADS, ",")))
    is_the_loads(got)
    assert got.notes[0] == "no header: columns taken as layer, expert, count"


def test_bare_matrix(tmp_path: Path) -> None:
    got = read_recording(write(tmp_path / "a", "\n".join(",".join(map(str, row)) for row in LOADS)))
    is_the_loads(got)
    assert got.format == "csv-matrix"
    with pytest.raises(FormatError, match="line 2: 4 cells, the first row has 5"):
        read_recording(write(tmp_path / "b", "1,2,3,4,5\n1,2,3,4\n"))
    with pytest.raises(FormatError, match="line 2, column 3: 'x' is no number"):
        read_recording(write(tmp_path / "b", "1,2,3,4,5\n1,2,x,4,5\n"))


def test_table_with_scenarios_and_with_steps(tmp_path: Path) -> None:
    lines = [f"{'abcde'[t]},{i},{e},{x}" for (t, i, e), x in np.ndenumerate(STEPS)]
    got = read_recording(write(tmp_path / "a", "workload,layer,expert,count\n" + "\n".join(lines)))
    is_the_loads(got, STEPS)
    assert got.scenarios == tuple("abcde")
    got = read_recording(write(tmp_path / "b", "step,layer,expert,count\n" + "\n".join(lines)))
    is_the_loads(got, STEPS.sum(axis=0))
    got = read_recording(tmp_path / "b", steps="keep")
    is_the_loads(got, STEPS)
    assert got.scenarios == tuple("abcde")


def test_table_rows_add_up_and_absent_ones_are_zero(tmp_path: Path) -> None:
    got = read_recording(write(tmp_path / "a", "layer,expert,count\n7,1,3\n3,0,2\n7,1,4\n"), experts=4)
    assert got.load_TLE.tolist() == [[[2, 0, 0, 0], [0, 7, 0, 0]]]
    assert got.layers == (3, 7)
    assert "1 repeated rows added up" in got.notes


def test_key_names_the_count_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "layer,expert,count,prefill\n0,0,1,5\n0,1,1,6\n")
    assert read_recording(path, key="prefill").load_TLE.tolist() == [[[5, 6]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert\n0,0\n", "is a table without a column for count; its first row is 'layer, expert'"),
        ("hello world\nthis is text\n", "without a column for layer and expert and count; its first row"),
        ("layer,expert,count\n", "is a table with a header and no rows"),
        ("# nothing\n#\n", "is a table without rows"),
        ("layer,expert,count\n0,0,abc\n", "line 2: count is 'abc', must be a number >= 0"),
        ("layer,expert,count\n0,0,-1\n", "line 2: count is '-1', must be a number >= 0"),
        ("layer,expert,count\n0,0,nan\n", "line 2: count is 'nan'"),
        ("layer,expert,count\n0,0,1_000\n", "line 2: count is '1_000'"),
        ("layer,expert,count\n0,0,1\n0,1.5,2\n", "line 3: expert is '1.5', must be a whole number from 0"),
        ("layer,expert,count\n-1,0,1\n", "line 2: layer is '-1', must be a whole number from 0"),
        ("layer,expert,count\nl3.x4,0,1\n", "line 2: layer is 'l3.x4', must be a whole number"),
        ("layer,expert,count\n0,0\n", "line 2: 2 cells, the first row has 3"),
        ("layer,expert,count\n0,2000000000,1\n", "names expert 2000000000 .*raise MOELESS_MAX_READ"),
        ("1,2\n3,4\n", "line 1: 2 columns without a header"),
        ('layer,expert,count\n0,0,"' + "1" * 200_000, "no readable table"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_recording(write(tmp_path / "a.csv", text))


# --- compression, sizes, paths -----------------------------------------------------------------------------


def test_gzip_of_any_format(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, LOADS)
    for content in (
        stream.getvalue(),
        json.dumps({"logical_count": LOADS.tolist()}).encode(),
        b"layer,expert,count\n" + long_rows(LOADS, ",").encode(),
    ):
        is_the_loads(read_recording(write(tmp_path / "a", gzip.compress(content))))
        with pytest.raises(FormatError, match="truncated gzip"):
            read_recording(write(tmp_path / "b", gzip.compress(content)[:-9]))
        half = len(content) // 2
        members = gzip.compress(content[:half]) + gzip.compress(content[half:]) + b"\0" * 8
        is_the_loads(read_recording(write(tmp_path / "c", members)))
    with pytest.raises(FormatError, match="bytes follow its end"):
        read_recording(write(tmp_path / "b", gzip.compress(b"1") + b"more"))
    with pytest.raises(FormatError, match="unpacks to more than 1 kB"):
        read_recording(write(tmp_path / "b", gzip.compress(b"1" * 600) * 2), max_bytes=1000)
    with pytest.raises(FormatError, match="gzipped twice"):
        read_recording(write(tmp_path / "b", gzip.compress(gzip.compress(b"1"))))


def test_a_gigabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "big.json", "wb") as stream:
        stream.write(b'{"logical_count": [[')
        stream.truncate(2**30)  # sparse: takes no disk
    with pytest.raises(FormatError, match=r"big\.json: has 1.07 GB, more than the limit of 256 MB"):
        read_recording(tmp_path / "big.json")


def test_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"unpacks to more than 1.05 MB"):
        read_recording(write(tmp_path / "a", gzip.compress(b"0" * 2**22)), max_bytes=2**20)
    np.savez_compressed(tmp_path / "b.npz", counts=np.zeros((1024, 1024)))
    with pytest.raises(FormatError, match=r"counts has shape \[1024, 1024\], more than 1.05 MB"):
        read_recording(tmp_path / "b.npz", max_bytes=2**20)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 8), }".ljust(117) + b"\n"
    write(tmp_path / "c.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(FormatError, match=r"array has shape \[1099511627776, 8\], more than 256 MB"):
        read_recording(tmp_path / "c.npy")
    with pytest.raises(FormatError, match=r"is text of 2.1 MB; text takes many times its size"):
        read_recording(write(tmp_path / "d", "[" + " " * 2**21), max_bytes=2**22)
    with pytest.raises(FormatError, match="nested"):
        read_recording(write(tmp_path / "e", "[" * 200_000))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_can_be_read_and_is_bounded(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for content in (json.dumps(LOADS.tolist()).encode(), b"0" * 2**16):
        writer = threading.Thread(target=lambda c=content: (tmp_path / "pipe").write_bytes(c))
        writer.start()
        if len(content) < 2**15:
            is_the_loads(read_recording(tmp_path / "pipe"))
        else:
            with pytest.raises(FormatError, match=r"more than the limit of 65.5 kB"):
                read_recording(tmp_path / "pipe", max_bytes=2**16 - 1)
        writer.join(10)
        assert not writer.is_alive()


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"absent\.json: cannot be read: No such file"):
        read_recording(tmp_path / "absent.json")
    with pytest.raises(FormatError, match="is a folder without recordings"):
        read_recording(tmp_path)
    with pytest.raises(FormatError, match="is no path"):
        read_recording("a\0b")


# --- content that is no recording --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "has no array .* its keys: none"),
        ({"a": 1, "b": "x"}, "has no array .* its keys: a, b"),
        ([], "array is empty"),
        ([[]], r"the loads have shape \[1, 0\]"),
        ([1, 2, 3], r"the loads have shape \[3\].*save it as \[1, experts\]"),
        ([[[[1]]]], "nested more than 3 deep"),
        ([[1, 2], [3]], r"array\[1\] has 1 entries, the first row has 2: rows must be equal"),
        ([[1, 2], 3], r"array\[1\] is a number, must be a list of 2"),
        ([[[1, 2]], [[1, 2], [3, 4]]], r"array\[1\] has 2 entries, the first row has 1"),
        ({"counts": [[1, None]]}, r"counts\[0\]\[1\] is null, must be a number"),
        ({"counts": [[1, 2], [True, 2]]}, r"counts\[1\]\[0\] is a boolean"),
        ({"counts": [[1, "2"]]}, r"counts\[0\]\[1\] is a string"),
        ({"counts": [[1, [2]]]}, r"counts\[0\]\[1\] is a list"),
        ({"counts": [[1, 10**400]]}, r"counts\[0\] has too large a number"),
        ({"counts": [[1, 1e300]]}, "layer 0, expert 1: the load is 1e"),
        ({"counts": "none"}, "counts is a string, must be an array"),
        ([[1, float("nan")]], "layer 0, expert 1: the load is nan, must be a number from 0"),
        ([[[1, 2], [float("inf"), 2]]], "scenario 0, layer 1, expert 0: the load is inf"),
        ([[1, -2]], "layer 0, expert 1: the load is -2"),
        ([[0, 0], [0, 0]], "has no load at all: every count is 0"),
        ({"format": "moeless-problem", "version": 1}, "is a moeless-problem document, not a recording"),
    ],
)
def test_bad_json(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_recording(write(tmp_path / "a.json", json.dumps(document)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; known formats"),
        (b"  \n\t ", "holds only white space"),
        (gzip.compress(b"", mtime=0), "is empty inside its gzip"),
        (b'{"logical_count": [[1, 2], [3', "no valid JSON.*truncated"),
        (b'{"logical_count": [[1, 2],, [3]]}', "no valid JSON: .* at line 1, column 27"),
        (b"[[1, 2]] trailing", "no valid JSON: Extra data"),
        (b"\x00\x01\x02\x03" * 20, "is binary in no known format"),
        (b"\xff\x00\xfe" * 20, "is binary in no known format"),
        (b"\x93NUMPY", "truncated or damaged .npy header"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': evil()}", "truncated or damaged .npy header"),
        (b"PK\x03\x04 not a zip", "truncated or damaged zip archive"),
        (b"\x1f\x8b not a gzip", "is a damaged gzip file"),
        ("[[1, 2], [3, 4]]".encode("utf-16")[:-1], "is binary in no known format"),
    ],
)
def test_bad_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_recording(write(tmp_path / "a", content))


def test_other_encodings_of_text(tmp_path: Path) -> None:
    text = json.dumps(LOADS.tolist())
    for encoding in ("utf-16", "utf-8-sig"):
        is_the_loads(read_recording(write(tmp_path / "a", text.encode(encoding))))


def test_arrays_that_are_no_loads(tmp_path: Path) -> None:
    for array, message in (
        (np.ones(3), r"the loads have shape \[3\]"),
        (np.ones((0, 4)), r"the loads have shape \[0, 4\]"),
        (np.ones((1, 1, 2, 2)), r"the loads have shape \[1, 1, 2, 2\]"),
        (np.array([["a", "b"]]), "has type <U1, must be numbers"),
        (np.ones((2, 2), dtype=complex), "has type complex128"),
        (np.zeros((2, 2), dtype=[("a", "f8")]), "must be numbers"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(FormatError, match=message):
            read_recording(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match="is a zip archive without arrays"):
        read_recording(tmp_path / "b.zip")


def test_options_are_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LOADS)
    with pytest.raises(FormatError, match=r"single \.npy array and has no key 'x'"):
        read_recording(tmp_path / "a.npy", key="x")
    with pytest.raises(FormatError, match="steps: must be sum or keep, got 'mean'"):
        read_recording(tmp_path / "a.npy", steps="mean")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="experts: must be at least 1, got 0"):
        read_recording(tmp_path / "a.npy", experts=0)
    with pytest.raises(FormatError, match=r"has loads of \d+ experts per layer; experts=99 cannot"):
        read_recording(tmp_path / "a.npy", experts=99)
    with pytest.raises(FormatError, match="has no scenario '1'; it has numbers 0 to 0"):
        read_recording(tmp_path / "a.npy", scenario=1)


def test_an_archive_that_lost_its_first_bytes(tmp_path: Path) -> None:
    """Its directory is whole, and points to places before the file."""
    np.savez(tmp_path / "a.npz", counts=LOADS)
    raw = (tmp_path / "a.npz").read_bytes()
    for lost in (30, 200):
        path = write(tmp_path / "b.npz", b"PK\x03\x04" + raw[lost:])
        with pytest.raises(FormatError, match=r"b\.npz: counts is truncated or damaged \(negative seek"):
            read_recording(path)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One valid file of each binary and text format."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("samples")
    np.save(folder / "a.npy", LOADS)
    npz(folder / "b.npz", counts=STEPS, workloads=np.array(list("abcde")))
    torch.save({"logical_count": torch.tensor(STEPS)}, folder / "c.pt")
    write(folder / "d.json", {"logical_count": LOADS.tolist()})
    write(folder / "e.csv", "layer,expert,count\n" + long_rows(LOADS, ","))
    write(folder / "f.gz", gzip.compress((folder / "d.json").read_bytes()))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def is_read_or_refused(path: Path) -> None:
    """Whatever the file holds: finite loads, or a FormatError that names the file; nothing else."""
    try:
        got = read_recording(path, max_bytes=2**20)
    except FormatError as error:
        refused = str(error)
    else:
        refused = ""
        assert np.isfinite(got.load_TLE).all()
    assert not refused or refused.startswith(str(path))


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_files_end_in_a_format_error_or_are_read(
    samples: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(samples)))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    content = content[:cut]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(content))
    is_read_or_refused(path)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_garbage_ends_in_a_format_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(content)
    is_read_or_refused(path)


# --- the measured recordings -------------------------------------------------------------------------------


def test_measured_recordings(shared_data: Path) -> None:
    counts = read_recording(shared_data / "deepseek_v3_counts.npz")
    assert counts.load_TLE.shape == (6, 58, 256)
    assert "prefill_in1024" in counts.scenarios
    assert counts.skipped == ()
    sglang = read_recording(shared_data / "sglang" / "prefill_in1024.json")
    assert sglang.skipped == (0, 1, 2)
    assert sglang.layers == tuple(range(3, 61))
    one = read_recording(shared_data / "deepseek_v3_counts.npz", scenario="prefill_in1024")
    np.testing.assert_array_equal(sglang.load_TLE, one.load_TLE)
    with pytest.raises(FormatError, match=r"choose one by key: bookcorpus \[20, 12, 60\]"):
        read_recording(shared_data / "qwen15_moe_iterations.npz")
    assert read_recording(shared_data / "qwen15_moe_iterations.npz", key="wmt19").load_TLE.shape == (
        20,
        12,
        60,
    )
    domains = read_recording(shared_data / "olmoe_mixtral_domain_counts.npz", key="mixtral__expert_counts__*")
    assert domains.load_TLE.shape == (5, 3, 8)
    trace = read_recording(shared_data / "gptoss20b_topk.npz")
    assert trace.load_TLE.shape == (1, 24, 32)
    assert (trace.load_TLE.sum(axis=2) == 215438 * 4).all()


def test_a_recording_as_loads(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    np.savez(path, chat=[[0, 0], [1, 2]], code=[[0, 0], [5, 1]])
    load = read_loads(path, key="c*", scenario="code")
    assert load.load_TLE.tolist() == [[[5, 1]]]
    assert load.layers == (1,)
    assert load.skipped == (0,)
    assert "dense layers 0 skipped" in repr(load)
    assert str(path) in load.source
