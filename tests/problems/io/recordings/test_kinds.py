"""Recordings as engines and people write them, each a seeded twin whose right loads are known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moeless_opt.problems.errors import FormatError
from moeless_opt.problems.io.recordings.evidence import reading_of
from moeless_opt.problems.io.recordings.read import Recording, read_recording
from tests.recorded import MAP, STEPS, TRACE, Kind, kinds, slot_loads

CASES = Path(os.environ.get("MOELESS_DATA", "/nowhere")).parent / "cases"


def same(got: Recording, load_LE: NDArray[Any], layers: tuple[int, ...] | None = None) -> None:
    assert got.load_TLE.shape[0] == 1
    np.testing.assert_array_equal(got.load_TLE[0], load_LE)
    assert layers is None or got.layers == layers


# --- every kind --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Kind, Path]]:
    """A recording of every kind, in a folder of its own."""
    found = {}
    for kind in kinds():
        folder = tmp_path_factory.mktemp(kind.name)
        found[kind.name] = kind, kind.write(folder)
    return found


@pytest.mark.parametrize("name", [kind.name for kind in kinds()])
def test_a_kind_is_read_right(written: dict[str, tuple[Kind, Path]], name: str) -> None:
    kind, path = written[name]
    got = read_recording(path, **kind.options)
    same(got, kind.load_LE, kind.layers or (0, 1, 2))
    assert got.format == kind.format


def test_steps_can_be_kept(written: dict[str, tuple[Kind, Path]]) -> None:
    for name in (
        "sglang-per-pass",
        "tensorrt-llm",
        "megatron-dump",
        "vllm-stats",
        "table-steps",
        "wide-steps",
    ):
        kind, path = written[name]
        got = read_recording(path, steps="keep", **kind.options)
        np.testing.assert_array_equal(got.load_TLE, STEPS)
        assert len(got.scenarios) == len(STEPS)


# --- what has two readings ---------------------------------------------------------------------------------


def saved(path: Path, array: NDArray[Any]) -> Path:
    np.save(path, array)
    return path


def test_values_tell_a_trace_from_scenarios(tmp_path: Path) -> None:
    got = read_recording(saved(tmp_path / "a.npy", TRACE))
    assert got.format == "token-trace"
    assert any("none of 300 rows repeats a value" in note for note in got.notes)
    for dtype in ("u1", "i8", "f4"):
        same(read_recording(saved(tmp_path / "a.npy", TRACE.astype(dtype))), got.load_TLE[0])
    counts = np.random.default_rng(3).multinomial(4096, np.full(8, 1 / 8), size=(4, 3))
    assert reading_of(counts) == ("counts", "all layers of a step have one sum")
    np.testing.assert_array_equal(read_recording(saved(tmp_path / "a.npy", counts)).load_TLE, counts)


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_a_trace_with_its_axes_turned_is_refused(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    path = saved(tmp_path / "a.npy", TRACE.transpose(axes))
    with pytest.raises(FormatError, match="as_='"):
        read_recording(path)
    np.savez(tmp_path / "b.npz", routed_experts=TRACE.transpose(axes))
    with pytest.raises(FormatError, match="transpose it"):
        read_recording(tmp_path / "b.npz")


def test_loads_with_their_axes_turned_are_refused(tmp_path: Path) -> None:
    for array in (STEPS.sum(0).T, STEPS.transpose(0, 2, 1), STEPS.transpose(2, 1, 0)):
        for path in (saved(tmp_path / "a.npy", array), tmp_path / "c.npz"):
            np.savez(tmp_path / "c.npz", counts=array)
            with pytest.raises(FormatError, match="axes in another order"):
                read_recording(path)
            got = read_recording(path, as_="counts")
            assert got.load_TLE.shape[-2:] == array.shape[-2:]
    with pytest.raises(FormatError, match="no model has 200 layers"):
        read_recording(saved(tmp_path / "a.npy", np.random.default_rng(0).random((200, 30))))


def test_a_short_trace_is_refused_until_it_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", TRACE[:4])
    with pytest.raises(
        FormatError, match=r"a\.npy: array \[4, 3, 2\] can be loads .* say which with --as counts"
    ):
        read_recording(path)
    assert read_recording(path, as_="trace").load_TLE.sum() == 24
    assert read_recording(path, as_="counts").load_TLE.shape == (4, 3, 2)


def test_one_choice_each(tmp_path: Path) -> None:
    top1 = np.random.default_rng(5).integers(0, 8, (60, 3))
    path = saved(tmp_path / "a.npy", top1)
    with pytest.raises(FormatError, match=r"\[tokens, layers\] of one choice each: every number from 0 to 7"):
        read_recording(path)
    right = [np.bincount(column, minlength=8) for column in top1.T]
    same(read_recording(path, as_="trace"), np.array(right))
    np.savez(tmp_path / "b.npz", topk_ids=top1[:, :, None])
    same(read_recording(tmp_path / "b.npz"), np.array(right))
    few = np.random.default_rng(6).random((60, 8)).argsort(1)[:, :3]
    with pytest.raises(FormatError, match=r"or \[tokens, top-k\] of one layer"):
        read_recording(saved(tmp_path / "c.npy", few), as_="trace")


def test_padding_is_no_choice(tmp_path: Path) -> None:
    right = read_recording(saved(tmp_path / "a.npy", TRACE)).load_TLE[0]
    for pad in (0, -1, 65535):
        padded = np.concatenate([TRACE, np.full((7, 3, 2), pad)])
        np.savez(tmp_path / "p.npz", routed_experts=padded)
        same(read_recording(tmp_path / "p.npz"), right)
        dense = np.concatenate([np.full((len(padded), 1, 2), pad), padded], axis=1)
        np.savez(tmp_path / "d.npz", routed_experts=dense)
        got = read_recording(tmp_path / "d.npz")
        same(got, right, (1, 2, 3))
        if pad >= 0:
            assert any("7 of 107 tokens are padding" in note for note in got.notes)
    twice = TRACE.copy()
    twice[5, 1] = 3
    np.savez(tmp_path / "t.npz", routed_experts=twice)
    with pytest.raises(FormatError, match="token 5 chooses expert 3 twice in layer 1, which no router does"):
        read_recording(tmp_path / "t.npz")


def test_one_choice_each_beside_a_dense_layer_and_padding(tmp_path: Path) -> None:
    top1 = np.random.default_rng(5).integers(0, 8, (60, 3, 1))
    padded = np.concatenate([top1, np.full((5, 3, 1), -1)])
    dense = np.concatenate([np.where(padded[:, :1] < 0, -1, 0), padded], axis=1)
    np.savez(tmp_path / "a.npz", routed_experts=dense)
    right = np.array([np.bincount(column, minlength=8) for column in top1[:, :, 0].T])
    same(read_recording(tmp_path / "a.npz"), right, (1, 2, 3))


def test_steps_of_one_layer(tmp_path: Path) -> None:
    steps = np.random.default_rng(1).multinomial(512, np.full(8, 1 / 8), size=5)[:, None]
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": steps.tolist()}))
    same(read_recording(tmp_path / "a.json"), steps.sum(0))
    with pytest.raises(FormatError, match=r"\[layers, steps, experts\]"):
        read_recording(saved(tmp_path / "a.npy", steps))


def test_weights_of_the_choices_are_no_loads(tmp_path: Path) -> None:
    right = read_recording(saved(tmp_path / "a.npy", TRACE)).load_TLE[0]
    np.savez(tmp_path / "b.npz", experts=TRACE, weights=np.full(TRACE.shape, 0.5))
    same(read_recording(tmp_path / "b.npz"), right)
    np.savez(tmp_path / "c.npz", experts=TRACE, counts=right)
    with pytest.raises(FormatError, match=r"has both loads counts .* and chosen experts experts"):
        read_recording(tmp_path / "c.npz")
    same(read_recording(tmp_path / "c.npz", key="counts"), right)


# --- physical loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["expert_load", "counts", "tokens_per_expert", "something"])
def test_a_map_beside_loads_is_used(tmp_path: Path, name: str) -> None:
    slots = slot_loads(STEPS)
    np.savez(tmp_path / "a.npz", **{name: slots.sum(0), "p2l_map": MAP})
    same(read_recording(tmp_path / "a.npz"), STEPS.sum(0))
    np.savez(tmp_path / "b.npz", **{name: STEPS.sum(0), "p2l_map": MAP})
    same(read_recording(tmp_path / "b.npz"), STEPS.sum(0))  # as wide as there are experts, not slots
    np.savez(tmp_path / "c.npz", **{name: slots.sum(0)[:, :-2], "p2l_map": MAP})
    with pytest.raises(FormatError, match="9 columns, but p2l_map has 11 slots of 8 experts"):
        read_recording(tmp_path / "c.npz")


def test_a_map_of_another_name_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", counts=slot_loads(STEPS).sum(0), placed=MAP)
    with pytest.raises(FormatError, match="placed beside it looks like their map"):
        read_recording(tmp_path / "a.npz")
    assert read_recording(tmp_path / "a.npz", as_="counts").load_TLE.shape == (1, 3, 11)


def test_as_many_slots_as_experts_must_be_told(tmp_path: Path) -> None:
    load = STEPS.sum(0)
    order = np.random.default_rng(1).permutation(8)
    np.savez(tmp_path / "a.npz", counts=load[:, order], physical_to_logical_map=order)
    with pytest.raises(FormatError, match="it can be loads of slots or of logical experts"):
        read_recording(tmp_path / "a.npz")
    same(read_recording(tmp_path / "a.npz", as_="physical"), load)
    same(read_recording(tmp_path / "a.npz", as_="counts"), load[:, order])
    np.savez(tmp_path / "b.npz", counts=load, physical_to_logical_map=np.arange(8))
    same(read_recording(tmp_path / "b.npz"), load)


def test_a_map_can_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", slot_loads(STEPS).sum(0))
    with pytest.raises(FormatError, match="are of physical slots, and there is no map"):
        read_recording(path, as_="physical")
    np.savez(tmp_path / "map.npz", physical_to_logical_map=MAP, other=MAP)
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": MAP.tolist()}))
    for given in (
        MAP,
        MAP.tolist(),
        tmp_path / "map.npz",
        tmp_path / "map.json",
        saved(tmp_path / "m.npy", MAP),
    ):
        same(read_recording(path, as_="physical", physical_to_logical=given), STEPS.sum(0))
    (tmp_path / "map.json").write_text('{"a": 1, "b": 2}')
    with pytest.raises(FormatError, match=r"map\.json: has no physical_to_logical_map; it has a, b"):
        read_recording(path, as_="physical", physical_to_logical=tmp_path / "map.json")
    with pytest.raises(FormatError, match="must hold logical experts from 0"):
        read_recording(path, as_="physical", physical_to_logical=MAP - 2)


# --- files of ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [kind.name for kind in kinds() if kind.ranks])
def test_a_missing_rank_is_named(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in kinds() if kind.name == name)
    path = kind.write(tmp_path)
    files = sorted(one for one in tmp_path.rglob("*") if "rank1" in one.name)
    assert files
    for file in files:
        file.unlink()
    with pytest.raises(FormatError, match=r"rank 1\b"):
        read_recording(path, **kind.options)


def test_one_rank_alone_says_so(tmp_path: Path) -> None:
    kind = next(kind for kind in kinds() if kind.name == "megatron-dump")
    folder = kind.write(tmp_path)
    got = read_recording(folder / "loads_rank0.npz")
    assert got.layers == kind.layers
    assert any("rank 0 of 3 alone" in note for note in got.notes)
    with pytest.raises(FormatError, match="the file of rank 1 is missing"):
        read_recording(str(tmp_path / "*" / "*rank0*"))


def change(
    name: str, edit: Callable[[dict[str, Any]], None], file: str = "loads_rank1.npz"
) -> Callable[[Path], Path]:
    """A kind's files with one of them changed."""

    def write(folder: Path) -> Path:
        path = next(kind for kind in kinds() if kind.name == name).write(folder)
        with np.load(path / file) as archive:
            arrays = dict(archive)
        edit(arrays)
        np.savez(path / file, **arrays)
        return path

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (change("megatron-dump", lambda a: a.update(loads=a["loads"][:, :, :6])), "6 experts.*two models"),
        (
            change("megatron-dump", lambda a: a.update(global_rank=np.int32(2))),
            "written by rank 2, its name says 1",
        ),
        (
            change("megatron-dump", lambda a: a.update(forward_counts=a["forward_counts"] - 1)),
            "rank 1 has no loads of",
        ),
        (
            change("megatron-dump", lambda a: a.update(forward_counts=np.array([4, 4, 3]))),
            "cut off within a forward",
        ),
        (
            change("megatron-dump", lambda a: a.update(layer_numbers=a["layer_numbers"] + 1)),
            "no loads of layer 7",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_recording(write(tmp_path))


def test_stages_of_a_pipeline_hold_other_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    right = np.zeros((4, 8))
    for rank in range(4):
        group = [0, 1] if rank < 2 else [2, 3]
        loads = rng.integers(0, 99, (2, 3, 8)).astype(np.int32)
        layers = np.array([1, 2]) + (2 if rank > 1 else 0)
        right[layers - 1] += loads[:, :2].sum(1)
        np.savez(
            tmp_path / f"mcore_ep_loads_rank{rank}_x.npz",
            dump_version="mcore_ep_load_dump_v1",
            loads=loads,
            layer_numbers=layers,
            forward_counts=[2, 2],
            ep_group_ranks=group,
            global_rank=rank,
        )
    same(read_recording(tmp_path), right, (1, 2, 3, 4))
    (tmp_path / "mcore_ep_loads_rank3_x.npz").unlink()
    with pytest.raises(FormatError, match="the file of rank 3 is missing"):
        read_recording(tmp_path)


def test_files_that_nothing_tells_apart(tmp_path: Path) -> None:
    for name in "ab":
        saved(tmp_path / f"{name}.npy", STEPS.sum(0))
    with pytest.raises(FormatError, match="holds what another file holds too"):
        read_recording(tmp_path)
    for name in "ab":
        os.rename(tmp_path / f"{name}.npy", tmp_path / f"step{'ab'.index(name)}.npy")
    same(read_recording(tmp_path), 2 * STEPS.sum(0))
    (tmp_path / "step7.csv").write_text("layer,expert,count\n0,0,1\n0,1,1\n")
    with pytest.raises(FormatError, match=r"step7\.csv is csv, step0\.npy npy: two recordings"):
        read_recording(tmp_path)


# --- rows, names, tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"layer": 0, "counts": [1, 2]}\n{"layer": 1, "counts": [1, 2, 3]}\n',
            "3 experts, the first row has 2",
        ),
        ('{"layer": 0, "counts": [1, 2]}\n{"layer": 1, "cou', "line 2: is no valid JSON"),
        ('{"layer": 0, "counts": [1, 2]}\n[1]\n', "line 2: is a list, must be an object"),
        (
            '{"step": 0, "layer": 0, "counts": [1, 2]}\n{"step": 0, "layer": 0, "counts": [1, 2]}',
            "comes twice",
        ),
        (
            '{"step": 0, "layer": 0, "counts": [1, 2]}\n{"step": 0, "layer": 1, "counts": [1, 2]}\n'
            '{"step": 1, "layer": 0, "counts": [1, 2]}',
            "has no row for layer 1 in step 1",
        ),
        ('{"a": 1}\n{"a": 2}', "has rows without loads: a"),
        ('{"layer_0": [1, 2], "layer_0": [3, 4]}', "has the key 'layer_0' twice"),
        ('{"layer_0": [1, 2], "layers.0": [3, 4]}', "names layer 0 twice"),
        ('{"layer_0": [1, 2], "layer_1": [3, 4, 5]}', r"layer 1 has shape \[3\], the first \[2\]"),
        ('{"layer_0": [1, 2], "expert_1": [3, 4]}', "has keys of several kinds"),
        ('{"rank0": [[1, 2]], "rank2": [[1, 2]]}', "has nothing of rank 1"),
        ('{"tokens_per_rank": [[1, 2], [3, 4]]}', "tokens_per_rank alone, which by its name"),
        (
            '{"step": 0, "block": "decoder", "layer": 0, "rank": 0, "num_tokens": 2, '
            '"topk": 2, "top_indices": [[0, 1]]}',
            "num_tokens is 2, top_indices has 1",
        ),
        ('{"step": 0, "layer": 0, "top_indices": [[1, 1]]}', "token 0 chooses an expert twice"),
        (
            "Rank=0 iter=1 layer=0 tokens_per_expert=[1, 2]\nRank=1 iter=1 layer=0 tokens_per_expert=[1, 2",
            "line 2",
        ),
        (
            "Rank=0 iter=1 layer=0 tokens_per_expert=[1, 2]\nRank=1 iter=1 layer=0 tokens_per_expert=[3, 4]",
            r"4 experts in one expert-parallel group, or fewer in several; say how many",
        ),
        ("layer,expert_0,expert_2\n0,1,2\n", "a column for expert 2 and none for expert 1"),
        ("layer,expert_0,expert_0\n0,1,2\n", "names expert 0 in two columns"),
        ("gate,expert_0,expert_1\n0,1,2\n", "has a column for each expert and none for the layer"),
        ("0,5,6,7\n1,5,6,7\n2,5,6,7\n", "it may number the layers; give it a header"),
        ("rank,layer,expert,count\n0,0,0,1\n2,0,1,4\n", "has no row of rank 1"),
        ("layer,expert,count\n0,0,1\n0,1,1\n1,0,1\n1,1,1\n2,0,1\n", "ends after 1 experts of a layer"),
        ("layer,slot,count\n0,0,1\n0,1,1\n", "are of physical slots, and there is no map"),
        ("num_slots: 4\ninitial_global_assignments:\n  0: [0, 1, 2, 0]\n", "is a placement"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_recording(tmp_path / "a.txt")


def test_a_megatron_log_of_several_groups(tmp_path: Path) -> None:
    lines = [
        f"Rank={r} iter=7 layer={x} tokens_per_expert=[{r + 1}, {10 * x + r}]"
        for r in range(4)
        for x in (1, 2)
    ]
    (tmp_path / "a.log").write_text("\n".join(lines))
    got = read_recording(tmp_path / "a.log", experts=4)
    same(got, np.array([[1 + 3, 10 + 12, 2 + 4, 11 + 13], [4, 20 + 22, 6, 21 + 23]]), (1, 2))
    with pytest.raises(FormatError, match="which 5 experts per layer do not divide into"):
        read_recording(tmp_path / "a.log", experts=5)
    (tmp_path / "a.log").write_text("\n".join(line for line in lines if "Rank=3" not in line))
    with pytest.raises(
        FormatError, match="no line of rank 3, which is in one expert-parallel group with rank 2"
    ):
        read_recording(tmp_path / "a.log", experts=4)


# --- cases of others, where they are -----------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not here")
def test_small_files_that_were_misread() -> None:
    folder = CASES / "recordings"
    truth = np.load(folder / "truth_counts.npy")
    for name in ("a1_routed_experts.npy", "a2_routed_experts.npz", "b1_trace_with_dense_layer.npz"):
        same(read_recording(folder / name), truth)
    with np.load(folder / "c_megatron_dump_rank0.npz") as dump:
        same(read_recording(folder / "c_megatron_dump_rank0.npz"), dump["loads"].sum(1), (4, 5, 6))
    for name in ("d1_vllm_stats_record.json", "d2_physical_beside_known_map.json"):
        same(read_recording(folder / name), np.array([[14, 5, 5, 2], [2, 9, 2, 3]]))
    with pytest.raises(FormatError, match="say which with --as counts or --as trace"):
        read_recording(folder / "e_top1_trace_tokens_by_layers.npy")


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not here")
def test_engines_files() -> None:
    folder = CASES / "engines"
    for pattern, total in (
        ("sglang_recorder_per_pass_rank*.pt", 3072),
        ("trtllm_statistics", 6144),
        ("sglang_recorder_stat.pt", 6144),
        ("vllm_window.npz", 3072),
        ("sglang_logical_count.json", 93971),
    ):
        got = read_recording(folder / pattern)
        assert got.load_TLE.shape == (1, 4, 16), pattern
        assert got.load_TLE.sum() == total, pattern
    for name in ("ascend_expert_map.json", "sglang_init_map.json", "trtllm_moe_load_balancer.yaml"):
        with pytest.raises(FormatError, match="is a placement"):
            read_recording(folder / name)


def test_columns_that_play_no_part_are_named(tmp_path: Path) -> None:
    path = tmp_path / "loads.csv"
    path.write_text("layer,expert,count,dropped,share\n0,0,5,1,0.5\n0,1,5,2,0.5\n1,0,4,0,0.4\n1,1,6,0,0.6\n")
    found = read_recording(path)
    assert found.load_TLE.tolist() == [[[5, 5], [4, 6]]]
    assert list(found.notes) == ["columns left out: dropped, share"]


def test_experts_numbered_from_1_are_not_taken_for_others_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "loads.csv"
    path.write_text("layer,expert,count\n1,1,5\n1,2,4\n2,2,5\n2,3,7\n")
    assert any("expert 0 has no load" in note for note in read_recording(path).notes)
    path.write_text("layer,expert,count\n1,1,5\n1,3,4\n2,4,5\n2,3,7\n")  # expert 2 is idle, too
    assert not any("expert 0" in note for note in read_recording(path).notes)
