"""`oxmerge bench`: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from oxmerge import _core, build_info, demo
from oxmerge.bench import PARTS, arrays, cache, chart, compare, machine, programs, table
from oxmerge.bench.cases import Case, case_of, cases, with_far
from oxmerge.bench.compare import FASTER, SAME, SLOWER, UNKNOWN, Comparison
from oxmerge.bench.crew import Crews
from oxmerge.bench.measure import Job, Taken, UnavailableError, measure, time_left
from oxmerge.bench.panels import Bar, Panel, panels
from oxmerge.bench.programs import Mergekit, run_process
from oxmerge.bench.record import Record, Row, read_record, write_record
from oxmerge.bench.run import Settings, run, thread_counts
from oxmerge.bench.storage import Floor, storage_jobs
from oxmerge.bench.transfer import BUFFERED, DIRECT, MAPPED, Transfer, Way
from oxmerge.cli import bench as verb
from oxmerge.cli import main
from oxmerge.errors import OxmergeError
from oxmerge.sizes import three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

RECORDS = sorted((Path(__file__).parent.parent / "benches" / "record").glob("*.json"))
METHODS = [method["name"] for method in _core.methods()]
SMALL = demo.Shape(64, 2, 96, 4, 2, 300, tied=True, shards=2, filled=True)
DEEPSEEK = demo.SIZES["experts-671b"]
FEW_EXPERTS = demo.Experts(
    16, 2, 32, 2, 512, 2, 4, 8, query_rank=8, key_rank=8, rotary=4, plain=8, dense=1, filled=True
)
EXPERTS = {
    "experts": FEW_EXPERTS,
    "experts-twice": replace(FEW_EXPERTS, layers=4),
    "experts-671b": replace(FEW_EXPERTS, hidden=64, filled=False),
}
ELEMENTS = 1 << 14
STORAGE = 8 << 20

FAKE_MERGEKIT = f"""#!{sys.executable}
import shutil, sys
if sys.argv[1:] != ["--help"]:
    shutil.copytree("out", sys.argv[2])  # what oxmerge wrote just before
"""
FAKE_PYTHON = """#!/bin/sh
# Asked for its version, or by PEFT's program for BASE ADAPTER OUTPUT.
if [ $# = 5 ]; then cp -r out "$5"; else echo '"9.9"'; fi
"""


def quiet(_: str) -> None:
    """Hear what is measured now, and forget it."""


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Make the models small."""
    with pytest.MonkeyPatch.context() as patch:
        for size, shape in {"tiny": SMALL, "70b": replace(SMALL, filled=False), **EXPERTS}.items():
            patch.setitem(demo.SIZES, size, shape)
        yield


@pytest.fixture(scope="module")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Mergekit:
    """Pretend that there is a mergekit."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in (("python", FAKE_PYTHON), ("mergekit-yaml", FAKE_MERGEKIT)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return Mergekit.find(str(folder / "python"))


@pytest.fixture(scope="module")
def record(small: None, mergekit: Mergekit, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Measure everything once, as small as it gets."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_LEAST_BYTES", 1)
        patch.setattr("oxmerge.bench.merges.COLD", ("linear", "ties"))
        patch.setattr("oxmerge.bench.merges.DIGESTED", ("linear",))
        patch.setattr("oxmerge.bench.merges.SWEPT", {"ties": "parameters.lambda"})
        patch.setattr("oxmerge.bench.merges.SHARD", 1 << 16)
        for module in ("merges", "run"):
            patch.setattr(f"oxmerge.bench.{module}.LARGER", {"tiny": "70b"})
        settings = Settings(str(folder), PARTS, None, "tiny", 1, ELEMENTS, STORAGE)
        found = run(settings, _core.methods(), mergekit, quiet)
    assert list(folder.iterdir()) == []  # the files are gone
    return found


def rows(record: Record, part: str, by: str | None = None) -> list[Row]:
    return [row for row in record.rows if row.part == part and by in {None, row.by}]


# What is measured.


def test_every_part_is_measured(record: Record) -> None:
    assert {row.part for row in record.rows} == set(PARTS)
    for row in record.rows:
        assert len(row.seconds) == 1
        assert row.seconds[0] > 0
        assert row.bytes > 0


def test_no_two_rows_are_of_the_same_thing(record: Record) -> None:
    keys = [row.key for row in record.rows]
    assert len(set(keys)) == len(keys)


def test_every_method_is_measured_in_memory_and_in_files(record: Record) -> None:
    on_arrays = [name for name in METHODS if name not in {"metagpt", "nan"}]
    assert [row.name for row in rows(record, "kernels")][-len(on_arrays) :] == on_arrays
    merges = rows(record, "merge", "oxmerge")
    warm = [row.name for row in merges if row.state == "warm"]
    assert [name for name in warm if "far" not in name] == METHODS
    assert [name for name in warm if "far" in name] == ["ties, far", "dare_ties, far"]
    cold = [row.name for row in merges if row.state == "cold"]
    assert cold == ["linear", "ties", "ties, far"]
    told = ("page cache", "a sum over the whole model")  # which arrays in memory do not have
    failed = [note for note in record.notes if "not measured" in note]
    failed = [note for note in failed if not any(reason in note for reason in told)]
    assert failed == []


def test_threads_and_instruction_sets_are_side_by_side(record: Record) -> None:
    for name in arrays.SCALED:
        threads = [row.threads for row in rows(record, "threads") if row.name == name]
        assert threads == thread_counts()
        levels = [row.simd for row in rows(record, "simd") if row.name == name]
        assert levels == build_info()["simd_available"]


def test_bytes_are_those_that_a_run_moves(record: Record) -> None:
    moved = {row.name: (row.bytes_read, row.bytes_written) for row in rows(record, "memory")}
    one = 2 * ELEMENTS
    assert moved == {"copy": (one, one), "read": (one, 0), "write": (0, one)}
    by_name = {row.name: row for row in rows(record, "kernels")}
    assert by_name["ties"].bytes_read == 3 * 2 * ELEMENTS
    assert by_name["slerp"].bytes == 3 * 2 * ELEMENTS
    for row in rows(record, "storage"):
        assert row.bytes == STORAGE
    merges = rows(record, "merge", "oxmerge")
    for row in merges:
        floor = record.beside(row, "floor")
        assert floor is not None
        assert (floor.bytes_read, floor.bytes_written) == (row.bytes_read, row.bytes_written)
    # A header is all that a file has beside its tensors.
    assert 0 < min(row.bytes_written for row in merges) - demo.model_bytes("tiny") < 10_000


def test_a_sweep_reads_once_and_writes_every_output(record: Record) -> None:
    (sweep,) = rows(record, "sweep", "oxmerge")
    ties = next(row for row in rows(record, "merge", "oxmerge") if row.name == "ties")
    assert (sweep.name, sweep.bytes_read) == ("ties, 9 outputs", ties.bytes_read)
    assert sweep.bytes_written == 9 * ties.bytes_written
    floor = record.beside(sweep, "floor")
    assert floor is not None
    assert floor.bytes_written == sweep.bytes_written


def test_digests_and_journals_are_left_out(record: Record) -> None:
    found = rows(record, "digests", "oxmerge")
    left_out = ("linear", "linear, no digests", "linear, no journal")
    assert [row.name for row in found] == [*left_out, *left_out]
    assert [row.state for row in found] == ["warm"] * 3 + ["cold"] * 3
    assert len({row.bytes for row in found}) == 1


def test_many_tensors_are_planned_and_merged(record: Record) -> None:
    found = {row.name: row for row in rows(record, "tensors", "oxmerge")}
    counts = [sum(1 for _ in shape.tensors()) for shape in EXPERTS.values()][:2]
    merges = [f"{name}, {count:,} tensors" for count in counts for name in ("linear", "ties")]
    sparse = [f"plan of {name}, real sizes" for name in ("linear", "ties")]
    assert (
        list(found) == [name for merge in merges for name in (f"plan of {merge}", merge)] + sparse
    )
    for name in merges:
        row = found[name]
        assert row.tensors in counts
        assert row.bytes_read == 3 * row.bytes_written
        assert row.predicted_memory
        assert record.beside(row, "floor")
        assert record.beside(row, "mergekit")


def test_the_layout_is_that_of_deepseek() -> None:
    tensors = list(DEEPSEEK.tensors())
    assert sum(tensor.elements for tensor in tensors) == 671_026_419_200
    names = [tensor.name for tensor in tensors]
    assert len(names) == len(set(names)) == 61 * 9 + 3 * 3 + 58 * (2 + 3 * 257) + 3


def test_merges_tell_their_peak_memory_and_their_process(record: Record) -> None:
    for row in rows(record, "merge", "oxmerge"):
        assert row.peak_memory is not None
        assert 10 << 20 < row.peak_memory < 256 << 20
        assert row.process_seconds[0] > row.seconds[0]


def test_another_program_runs_once_for_each_merge(record: Record) -> None:
    others = rows(record, "merge", "mergekit")
    assert [row.name for row in others if "far" not in row.name] == METHODS
    assert all(row.peak_memory for row in others)
    assert record.settings["mergekit"] == "9.9"
    text = table.text(record)
    assert "mergekit 9.9" in text
    assert "whole processes" in text
    said = "linear: beside mergekit, 100.0000% of the elements are equal, the largest difference 0"
    assert said in record.notes


def test_adapters_are_put_into_a_model_and_into_a_part_of_a_larger_one(record: Record) -> None:
    found = rows(record, "fuse")
    whole, part = "rank 16 into tiny", "rank 16 into a part of 70b"
    assert [(row.name, row.by) for row in found] == [
        *((whole, by) for by in ("floor", "oxmerge", "mergekit", "peft")),
        *((part, by) for by in ("floor", "oxmerge")),
    ]
    model = demo.model_bytes("tiny")
    assert all(row.bytes_written == row.bytes_read >= model for row in found if row.name == whole)
    assert all(row.bytes_written < model / 3 for row in found if row.name == part)
    equal = "100.0000% of the elements are equal, the largest difference 0"
    assert f"{whole}: beside PEFT, {equal}" in record.notes
    assert "peft ×" in table.text(record)


def test_the_yardsticks_are_none_of_the_engines_code() -> None:
    for module in ("crew", "transfer", "storage", "cache"):
        text = (Path(arrays.__file__).parent / f"{module}.py").read_text()
        assert not re.search(r"_core|kernels|merge_tensors", text), module


@pytest.mark.parametrize(
    ("program", "count", "reason"),
    [
        ("echo no torch >&2; exit 3", 1, "mergekit 9.9: not measured: mergekit-yaml ended with 3"),
        ("exit 0", 1, "mergekit-yaml ended well, but left no model"),
        ("[ $1 = --help ] || sleep 60", 1, "mergekit-yaml was stopped after 0.2 s"),
    ],
)
def test_another_program_that_misbehaves_costs_only_its_own_rows(
    small: None,
    mergekit: Mergekit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    count: int,
    reason: str,
) -> None:
    broken = tmp_path / "mergekit-yaml"
    broken.write_text(f"#!/bin/sh\n{program}\n")
    broken.chmod(stat.S_IRWXU)
    monkeypatch.setattr(programs, "LIMIT", 0.2)
    settings = Settings(str(tmp_path), ("merge",), ("nuslerp",), rounds=1)
    found = run(settings, _core.methods(), replace(mergekit, program=broken), quiet)
    assert rows(found, "merge", "mergekit") == []
    assert [row.name for row in rows(found, "merge", "oxmerge")] == ["nuslerp"]
    assert len([note for note in found.notes if reason in note]) == count


# Parts of it.


def test_rounds_are_interleaved_and_warm_ups_do_not_count() -> None:
    order: list[str] = []

    def job(name: str, *, warm_up: bool, most: int | None = None) -> Job:
        def work() -> Taken:
            order.append(name)
            return Taken(float(len(order)))

        return Job(Row("memory", name, "x", "memory", 1, 1), work, None, warm_up, most)

    jobs = [job("a", warm_up=True), job("b", warm_up=False), job("c", warm_up=False, most=1)]
    found, notes = measure(jobs, 2, quiet)
    # What runs in fewer rounds runs in the last ones.
    assert order == ["a", "a", "b", "a", "b", "c"]
    assert [row.seconds for row in found] == [(2.0, 4.0), (3.0, 5.0), (6.0,)]
    assert notes == []


def test_the_time_left_is_told_when_it_is_known() -> None:
    one, other, never = (Job(Row("memory", "a", "x", "y", 1, 1), lambda: Taken(1)) for _ in "abc")
    assert time_left([one, other]) == "2 runs left"
    one.busy, other.busy = [1.0, 3.0], [58.0]
    assert time_left([one, other]) == "about 1 min 0 s left"
    assert time_left([one, other, never]) == "more than 1 min 0 s left"
    assert time_left([one, never, never]) == "3 runs left"


def test_what_is_measured_and_how_long_it_takes_is_said() -> None:
    said: list[str] = []
    jobs = [Job(Row("memory", name, "x", "y", 1, 1), lambda: Taken(1)) for name in "ab"]
    measure(jobs, 2, said.append)
    assert said == [
        "round 1 of 2, 4 runs left: memory: a, x, y",
        "round 1 of 2, 3 runs left: memory: b, x, y",
        "round 2 of 2, about 0.0 s left: memory: a, x, y",
        "round 2 of 2, about 0.0 s left: memory: b, x, y",
    ]


def test_what_cannot_be_measured_is_a_note() -> None:
    def fail() -> Taken:
        raise UnavailableError("no such thing")

    found, notes = measure([Job(Row("memory", "a", "x", "y", 1, 1), fail)], 3, quiet)
    assert found == []
    assert notes == ["memory: a, x, y: not measured: no such thing"]


def test_a_short_read_is_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Crews() as crews:
        jobs = [job for job in storage_jobs(tmp_path, STORAGE, crews) if job.row.state == "warm"]
        monkeypatch.setattr(os, "preadv", lambda *_: 17)
        found, notes = measure(jobs, 1, quiet)
    assert found == []
    assert "only 34 of 8388608 bytes were moved" in notes[0]


def test_every_write_is_flushed_on_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Crews() as crews:
        jobs = list(storage_jobs(tmp_path, STORAGE, crews))
        flushed: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
        for job in jobs:
            if job.row.name == "write":
                assert job.prepare is not None
                job.prepare()
                flushed.clear()
                job.run()
                assert flushed == [STORAGE], job.row.state


def test_the_page_cache_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    cache.drop([path])
    if cache.cached_share([path]) != 0:
        pytest.skip("this file system keeps its files in the page cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "warm", lambda _: None)
        with pytest.raises(UnavailableError, match="only 0% of the bytes stay in the page cache"):
            cache.bring([path], cached=True)
    cache.bring([path], cached=True)
    assert cache.cached_share([path]) == 1
    cache.bring([path], cached=False)
    assert cache.cached_share([path]) == 0


@pytest.mark.parametrize("how", [BUFFERED, DIRECT, MAPPED])
def test_the_floor_reads_all_and_writes_models(tmp_path: Path, how: str) -> None:
    random = np.random.default_rng(0)
    sizes = (3 << 20, (1 << 20) + 12345)
    models = []
    for model in range(3):
        paths = [tmp_path / f"{model}-{number}" for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            path.write_bytes(random.bytes(size))
        models.append(paths)
    outputs = [[tmp_path / f"out-{copy}-{path.name}" for path in models[0]] for copy in range(2)]
    transfer = Transfer(sizes, models, outputs)
    assert (transfer.bytes_read, transfer.bytes_written) == (3 * sum(sizes), 2 * sum(sizes))
    with Crews() as crews:
        floor = Floor(transfer, lambda: None, crews)
        for _ in range(2):  # the second finds what the first left
            floor.prepare()
            try:
                floor.ready(Way(3, 2 << 20, how, how))()
            except UnavailableError as reason:
                pytest.skip(str(reason))
    for output in outputs:
        assert [path.read_bytes() for path in output] == [path.read_bytes() for path in models[-1]]


def test_the_floor_is_the_fastest_way_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {
        Way(machine.cores() + 6, 8 << 20, writes=DIRECT): 2.0,
        Way(machine.cores(), 8 << 20, writes=DIRECT): 1.0,
    }

    def ready(_: Floor, way: Way) -> Any:
        def run() -> Taken:
            if way.reads == DIRECT:
                raise UnavailableError("this file system cannot do it")
            return Taken(seconds.get(way, 3.0))

        return run

    monkeypatch.setattr(Floor, "ready", ready)
    with Crews() as crews:
        floor = Floor(Transfer([], [], []), lambda: None, crews)
        assert seconds[floor.best_way(cold=True, say=quiet)] == 1

        def fail() -> None:
            raise UnavailableError("it stays in the page cache")

        floor = Floor(Transfer([], [], []), fail, crews)
        with pytest.raises(UnavailableError, match="it stays in the page cache"):
            floor.best_way(cold=True, say=quiet)


def test_a_process_has_its_own_peak_memory(tmp_path: Path) -> None:
    large = np.ones(50_000_000)
    done = run_process([sys.executable, "-I", "-S", "-c", "print('done')"], tmp_path)
    assert done.output == "done\n"
    assert done.peak_memory < large.nbytes / 4


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    code = "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UnavailableError, match="ended with 3: two"):
        run_process([sys.executable, "-c", code], tmp_path)
    with pytest.raises(UnavailableError, match="cannot be started"):
        run_process([str(tmp_path / "nothing")], tmp_path)


def test_the_instruction_set_is_forced_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with Crews() as crews:
        made = arrays.Arrays.draw(ELEMENTS, crews.of(1))
    seen: list[str | None] = []
    monkeypatch.setattr(
        "oxmerge.kernels.weighted_sum",
        lambda *_, **__: seen.append(os.environ.get("OXMERGE_SIMD")),
    )
    monkeypatch.setenv("OXMERGE_SIMD", "portable")
    for job in arrays.simd_jobs(made, []):
        if job.row.name.startswith("weighted_sum"):
            job.run()
    assert seen == build_info()["simd_available"]
    assert os.environ["OXMERGE_SIMD"] == "portable"


def test_cases_follow_from_the_description() -> None:
    by_name = {case.method: case for case in cases(_core.methods())}
    assert by_name["slerp"].shared == {"t": 0.4}
    assert (by_name["slerp"].models, by_name["slerp"].has_base) == (2, True)
    assert by_name["ties"].each == (
        {"weight": 0.6, "density": 0.5},
        {"weight": 0.4, "density": 0.5},
    )
    assert by_name["ties"].recipe(["b", 'c"', "d"]) == (
        'merge_method: ties\nbase_model: "b"\nmodels:\n'
        '  - model: "c\\""\n    parameters:\n      weight: 0.6\n      density: 0.5\n'
        '  - model: "d"\n    parameters:\n      weight: 0.4\n      density: 0.5\n'
        "dtype: bfloat16\n"
    )


def test_a_new_method_has_a_case() -> None:
    def parameter(name: str, per: str, *, required: bool) -> dict[str, Any]:
        return {"name": name, "per": per, "required": required}

    new = {
        "name": "new",
        "class": "selection",
        "contract": {"base": "required", "inputs": [2, None], "others": [1, None]},
        "parameters": [
            parameter("strength", "shared", required=True),
            parameter("density", "other", required=False),
            parameter("odd", "input", required=False),
        ],
    }
    case = case_of(new)
    assert (case.models, case.shared) == (3, {"strength": 0.5})
    assert case.each == ({"density": 0.5}, {"density": 0.5})


def test_far_fine_tunes_are_other_models() -> None:
    ties = cases(_core.methods(), ["ties"])
    near, far = with_far(ties)
    models = ["base", "near 1", "near 2", "far 1", "far 2"]
    assert near.of(models) == ["base", "near 1", "near 2"]
    assert far.of(models) == ["base", "far 1", "far 2"]
    assert (near.name, far.name) == ("ties", "ties, far")
    assert Case("linear", has_base=False, models=2, shared={}, each=()).of(models) == models[1:3]


# The record.


def made_up(*seconds: float, **changes: Any) -> Row:
    row = Row("kernels", "linear", "oxmerge", "memory", 300, 100, 2, "avx2", 50, seconds)
    return replace(row, **changes)


MACHINE: dict[str, Any] = {
    "cpu": "A <fast> & small one",
    "cores": 2,
    "virtual": False,
    "caches": {"L2": 1 << 20},
    "memory_bytes": 1 << 33,
    "kernel": "Linux 6",
    "file_system": "ext4 (rw)",
    "load_average": 0.0,
    "python": "3.12",
    "numpy": "2.0",
    "oxmerge": "0.1.0",
    "simd": "avx2",
    "simd_available": ["portable", "avx2"],
}
SETTINGS = {"size": "tiny", "rounds": 5, "elements": 50, "storage_bytes": 100}


def test_only_mount_options_that_bear_on_speed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = (
        "/dev/a / ext4 rw,relatime,resuid=1000,data=ordered,lowerdir=/home/me 0 0\n"
        f"server:/me {tmp_path} nfs4 rw,noatime,vers=4.2,rsize=1048576,addr=10.0.0.7,sec=sys 0 0\n"
    )
    monkeypatch.setattr(machine, "_text", lambda _: mounts)
    assert machine.file_system(tmp_path.parent) == "ext4 (rw,relatime,data=ordered)"
    assert machine.file_system(tmp_path) == "nfs4 (rw,noatime,vers=4.2,rsize=1048576)"


def record_of(*rows: Row, **changed: Any) -> Record:
    return Record({**MACHINE, **changed}, SETTINGS, rows)


def test_the_schema_stays(record: Record) -> None:
    data = json.loads(write_record(record))
    assert list(data) == ["schema", "version", "created", "machine", "settings", "rows", "notes"]
    assert (data["schema"], data["version"]) == ("oxmerge-bench", 1)
    assert set(data["machine"]) == {*MACHINE, "busy_elsewhere", "stolen"}
    assert set(data["settings"]) == {*SETTINGS, "mergekit"}
    assert {key for row in data["rows"] for key in row} == {
        *("part", "name", "by", "state", "bytes_read", "bytes_written", "threads", "simd"),
        *("elements", "tensors", "seconds", "process_seconds", "peak_memory"),
        *("predicted_memory", "median_seconds"),
        *("quartile_seconds", "gb_per_s", "elements_per_s", "share_of_memcpy", "times_floor"),
    }


def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(write_record(record))
    assert read_record(str(path)) == record


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_of_earlier_days_are_read(path: Path) -> None:
    record = read_record(str(path))
    assert "Merges of files" in table.text(record)
    assert chart.page(record)


def test_keys_that_are_new_do_no_harm(tmp_path: Path) -> None:
    data = json.loads(write_record(record_of(made_up(1, 2, 3))))
    data["rows"][0]["colour"] = "green"
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    assert read_record(str(path)).rows == (made_up(1, 2, 3),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "it is not JSON"),
        ("[]", 'its `schema` is not "oxmerge-bench"'),
        ('{"schema": "oxmerge-bench", "version": 2}', "has version 2 of its schema"),
        ('{"schema": "oxmerge-bench", "version": 1}', "something in it is amiss"),
    ],
)
def test_what_is_no_record_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(OxmergeError) as caught:
        read_record(str(path))
    assert message in str(caught.value)


def test_a_row_without_time_is_refused(tmp_path: Path) -> None:
    data = json.loads(write_record(record_of(made_up(1))))
    data["rows"][0]["seconds"] = [0]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    with pytest.raises(OxmergeError, match="took no time"):
        read_record(str(path))


BROKEN: list[tuple[str, Any, str]] = [
    ("machine", {}, "`machine` has no `cpu`"),
    ("machine", {**MACHINE, "caches": {"L2": "1M"}}, "`caches` has '1M' for `L2`"),
    ("machine", {**MACHINE, "simd_available": [1]}, "`simd_available` has 1 in it"),
    ("settings", {}, "`settings` has no `size`"),
    ("settings", "tiny", "the record has 'tiny' for `settings`"),
    ("notes", "abc", "the record has 'abc' for `notes`"),
    ("notes", [1], "`notes` has 1 in it"),
    ("rows", {}, "the record has {} for `rows`"),
    ("rows", [1], "a row is no object"),
]
BROKEN_ROWS: list[tuple[str, Any, str]] = [
    ("part", "disks", "`disks` is not among the parts memory,"),
    ("name", 7, "a row has 7 for `name`"),
    ("bytes_read", "300", "a row has '300' for `bytes_read`"),
    ("bytes_read", True, "a row has True for `bytes_read`"),
    ("bytes_read", 10**400, "for `bytes_read`"),
    ("threads", "two", "a row has 'two' for `threads`"),
    ("seconds", [float("nan")], "`seconds` has nan in it"),
    ("seconds", ["1"], "`seconds` has '1' in it"),
    ("seconds", [], "a row has no run"),
    ("process_seconds", None, "a row has None for `process_seconds`"),
    ("part", "merge", "a merge has no `process_seconds`"),
]


@pytest.mark.parametrize("shown", [(), ("--json",), ("--html", "p.html")])
@pytest.mark.parametrize(("key", "value", "message"), [*BROKEN, *BROKEN_ROWS])
def test_what_is_amiss_in_a_record_is_named(
    key: str, value: Any, message: str, shown: tuple[str, ...], bench: Any, tmp_path: Path
) -> None:
    data = json.loads(write_record(record_of(made_up(1, 2, 3))))
    (data["rows"][0] if (key, value, message) in BROKEN_ROWS else data)[key] = value
    (tmp_path / "r.json").write_text(json.dumps(data))
    code, out, err = bench("--show", "r.json", *shown)
    assert code == 1
    assert message in (json.loads(out)["error"]["message"] if "--json" in shown else err)


def test_a_row_that_moves_nothing_is_refused(tmp_path: Path) -> None:
    row = made_up(1, bytes_read=0, bytes_written=1)
    data = json.loads(write_record(record_of(row)))
    data["rows"][0]["bytes_written"] = 0
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(OxmergeError, match="a row moves no bytes"):
        read_record(str(tmp_path / "r.json"))


def test_what_follows_from_a_row() -> None:
    copy = Row("memory", "copy", "memcpy", "memory", 100, 100, 2, seconds=(1.0,))
    read = Row("memory", "read", "memcpy", "memory", 100, 0, 2, seconds=(0.25,))
    row = made_up(2.0, 4.0, 3.0, 10.0, 1.0)
    record = record_of(copy, read, row)
    assert row.median == 3
    assert row.quartiles == (2, 4)
    assert row.rate == pytest.approx(400 / 3)
    assert row.element_rate == pytest.approx(50 / 3)
    # A hundred bytes copied, and two hundred only read.
    assert record.memcpy_seconds(row) == pytest.approx(1 + 0.5)
    assert record.share_of_memcpy(row) == pytest.approx(1.5 / 3)
    assert record_of(copy, row).share_of_memcpy(row) == pytest.approx(400 / 200 / 3)
    assert record.share_of_memcpy(copy) is None
    assert record.share_of_memcpy(replace(row, threads=1)) is None
    floor = Row("merge", "ties", "floor", "warm", 1, 1, seconds=(2.0,))
    merge = replace(floor, by="oxmerge", seconds=(3.0,))
    cold = replace(merge, state="cold")
    assert record_of(floor, merge).times_floor(merge) == 1.5
    assert record_of(floor, merge).times_floor(floor) is None
    assert record_of(floor, cold).times_floor(cold) is None


# Comparison.


@pytest.mark.parametrize(
    ("old", "new", "verdict", "ratio"),
    [
        ((1.0, 1.01, 0.99), (0.5, 0.51, 0.49), FASTER, 2),
        ((0.5, 0.51, 0.49), (1.0, 1.01, 0.99), SLOWER, 0.5),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), SAME, 1),
        # Within the least difference, however steady both are.
        ((1.0, 1.0, 1.0), (1.02, 1.02, 1.02), SAME, 1 / 1.02),
        # Far apart, but so are the runs of each.
        ((1.0, 0.6, 1.4), (0.8, 0.5, 1.2), SAME, 1.25),
        # One bad run of five does not hide what the others say.
        ((1.0, 1.0, 1.01, 0.99, 5.0), (0.8, 0.8, 0.81, 0.79, 0.8), FASTER, 1.25),
        ((1.0, 1.0), (0.5, 0.5), UNKNOWN, 2),
    ],
)
def test_verdicts(
    old: tuple[float, ...], new: tuple[float, ...], verdict: str, ratio: float
) -> None:
    found = Comparison(made_up(*old), made_up(*new))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(ratio)


def test_noise_alone_seldom_makes_a_verdict() -> None:
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(1000):
        old, new = (made_up(*random.normal(1, 0.05, 5)) for _ in range(2))
        wrong += Comparison(old, new).verdict != SAME
    assert wrong < 30


def test_only_the_same_work_is_compared() -> None:
    same, other = made_up(1, 1, 1), made_up(1, 1, 1, name="ties")
    larger = replace(other, bytes_read=600)
    old, new = record_of(same, other), record_of(same, larger, cpu="B")
    assert [each.new for each in compare.compare(old, new)] == [same]
    remarks = list(compare.remarks(old, new))
    moved = "another number of bytes was moved"
    assert remarks == [
        "cpu differs: A <fast> & small one then, B now",
        f"1 row of the old record not compared, since {moved} now: {other.title}",
        f"1 row of the new record not compared, since {moved} then: {other.title}",
    ]


def merge(**changes: Any) -> Row:
    return made_up(1, **{"part": "merge", "state": "warm", "process_seconds": (2.0,), **changes})


@pytest.mark.parametrize(
    ("there", "here", "size", "reason"),
    [
        (made_up(1), merge(), "tiny", "the part `merge` was not measured then"),
        (merge(name="ties"), merge(), "tiny", "it was not measured then"),
        (merge(), merge(bytes_read=7), "1b", "the models were of size tiny then and 1b now"),
        (merge(), merge(bytes_read=7), "tiny", "another number of bytes was moved then"),
        (made_up(1, threads=4), made_up(1), "tiny", "it ran with 4 threads then"),
        (made_up(1, part="simd", simd="x"), made_up(1, part="simd"), "tiny", "avx2 was not mea"),
    ],
)
def test_why_a_row_has_no_partner(there: Row, here: Row, size: str, reason: str) -> None:
    new = replace(record_of(here), settings={**SETTINGS, "size": size})
    told = [line for line in compare.remarks(record_of(there), new) if "of the new record" in line]
    assert len(told) == 1
    assert f"since {reason}" in told[0]


def test_many_rows_without_a_partner_are_told_in_a_line() -> None:
    old = record_of(made_up(1), *(made_up(1, part="simd", simd=str(n)) for n in range(6)))
    (told,) = compare.remarks(old, record_of(made_up(1)))
    assert told.startswith("6 rows of the old record not compared, since the part `simd`")
    assert told.endswith("and 2 more")


def test_another_instruction_set_is_told() -> None:
    old, new = record_of(made_up(1)), record_of(made_up(2), simd="portable", python="3.13")
    assert list(compare.remarks(old, new)) == [
        "simd differs: avx2 then, portable now",
        "python differs: 3.12 then, 3.13 now",
    ]


def test_a_merge_is_compared_whatever_threads_it_chose() -> None:
    row = Row("merge", "ties", "floor", "warm", 1, 1, 2, seconds=(1.0,))
    assert len(compare.compare(record_of(row), record_of(replace(row, threads=8)))) == 1


# What people see.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.8, "1.80"),
        (9.996, "10.0"),
        (99.96, "100"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1077, "1077"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_tables_are_aligned_and_complete(record: Record) -> None:
    text = table.text(record)
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({len(line) for line in block.splitlines()}) == 1
    for name in METHODS:
        assert len(re.findall(rf"^\| {name} ", text, re.MULTILINE)) >= 2
    assert re.search("arrays of 32 KiB, (not larger than the largest cache|with caches)", text)


def test_the_svg_is_valid_and_has_a_label_for_every_bar(record: Record) -> None:
    root = ET.fromstring(chart.svg(record))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    for panel in panels(record):
        assert {f"{tick:g}" for tick in panel.ticks} <= set(texts)
        for bar in panel.bars:
            assert bar.label in texts
            assert bar.text in texts
    height = float(root.attrib["height"])
    for element in root.iter():
        assert float(element.attrib.get("y", 0)) <= height
        assert float(element.attrib.get("x", 0)) <= 860


def test_names_are_escaped() -> None:
    record = record_of(made_up(1, 2, 3, name="a<b>&"))
    assert "a<b>&" in {each.text for each in ET.fromstring(chart.svg(record)).iter()}
    assert "a<b>" not in chart.page(record)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_chart_is_readable_in_light_and_dark() -> None:
    style = re.search(r"<style>(.*?)</style>", chart.svg(record_of(made_up(1))), re.DOTALL)
    assert style is not None
    light, dark = style[1].split("@media (prefers-color-scheme: dark)")
    for scheme in (light, dark):
        colours = dict(re.findall(r"\.?(\w+) \{ fill: (#\w{6})", scheme))
        for text in ("text", "quiet"):
            assert contrast(colours[text], colours["back"]) >= 4.5
        for bar in ("yardstick", "oxmerge", "mergekit"):
            assert contrast(colours[bar], colours["back"]) >= 3


class Tags(HTMLParser):
    """Sees that tags are closed, and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file(record: Record) -> None:
    tags = Tags()
    page = chart.page(record)
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched == []
    assert "<script" not in page
    # Where there are two programs, their processes have a table of their own.
    assert page.count("<table>") == len(PARTS) + 4


def test_bars_of_a_panel_are_alike(record: Record) -> None:
    found = {panel.title: panel for panel in panels(record)}
    assert {"Storage: reads", "Storage: writes"} <= set(found)
    for state in ("warm", "cold"):
        panel = found[f"Merges of files, {state} inputs: from the first open to the last fsync"]
        merges = [row for row in rows(record, "merge", "oxmerge") if row.state == state]
        assert [bar.label for bar in panel.bars] == [row.name for row in merges]
        assert panel.line == "floor"
        for bar, row in zip(panel.bars, merges, strict=True):
            floor = record.beside(row, "floor")
            assert floor is not None
            assert bar.line is not None
            assert bar.value * 1e9 == pytest.approx(row.rate)
            assert bar.line * 1e9 == pytest.approx(floor.rate)
    panel = found["Merges of files: whole processes, from start to exit"]
    assert {bar.by for bar in panel.bars} == {"oxmerge", "mergekit"}
    row = rows(record, "merge", "oxmerge")[0]
    assert panel.bars[0].value * 1e9 == pytest.approx(row.bytes / row.process_seconds[0])


@pytest.mark.parametrize(("most", "last"), [(0.9, 0.8), (1, 1), (9.3, 8), (47, 40), (210, 200)])
def test_ticks_are_round_and_few(most: float, last: float) -> None:
    ticks = Panel("", (Bar("", "", most / 2, 0, most / 2, most),)).ticks
    assert ticks[0] == 0
    assert ticks[-1] == pytest.approx(last)
    assert 3 <= len(ticks) <= 7


def test_the_page_says_what_changed(record: Record) -> None:
    page = chart.page(record, record_of(made_up(1), cpu="old one"))
    assert "Then and now" in page
    assert "cpu differs: old one then" in page
    assert "of the new record not compared, since" in page


# The command.

Output = tuple[int, str, str]


@pytest.fixture
def bench(
    small: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Any:
    """Run the command with small sizes, in a folder of its own."""
    sizes = {"rounds": 1, "elements": ELEMENTS, "storage_bytes": STORAGE}
    monkeypatch.setattr(verb, "_QUICK", sizes)
    monkeypatch.setattr(arrays, "_LEAST_BYTES", 1)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Output:
        code = main(["bench", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_it_prints_a_table_and_is_quiet_otherwise(bench: Any, tmp_path: Path) -> None:
    code, out, err = bench("--quick", "--only", "memory,kernels")
    assert (code, err) == (0, "")
    assert out.startswith("# oxmerge ")
    assert "## Copies in memory" in out
    assert "## Storage" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_warned_about(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    _, out, err = bench("--quick", "--only", "memory")
    assert "warning: the load average was 9.00 at the start" in err
    assert "- the load average was 9.00 at the start" in out


def test_what_others_take_of_the_processor_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    counted = iter(["1 0 1 5 0 0 0 0 0 0", f"{6 * ticks + 1} 0 1 5 0 0 0 {ticks} 0 0"])
    clock, own = iter([0.0, 10.0]), iter([(0.0,) * 5, (1.0, 1.0, 0.0, 0.0, 9.0)])
    monkeypatch.setattr(machine, "_text", lambda _: f"cpu  {next(counted)}\ncpu0 1\n")
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "times", lambda: next(own))
    others = machine.Others()
    busy = others.busy()
    assert busy == {"busy_elsewhere": 0.4, "stolen": 0.1}
    told = machine.warnings_of({**MACHINE, "busy_elsewhere": 0.6, "stolen": 0.2})
    assert "; ".join(told) == (
        "other programs kept 0.60 of 2 cores busy; the host took 0.20 of 2 cores away; "
        "times are too long and uneven: measure again when it is quiet"
    )
    assert machine.warnings_of({**MACHINE, **busy, "stolen": 0.0}) == []


def test_it_writes_and_shows_and_compares_records(bench: Any, tmp_path: Path) -> None:
    files = ("--save", "r.json", "--svg", "c.svg", "--html", "p.html")
    code, out, _ = bench("--quick", "--only=memory", "--rounds", "3", *files)
    assert code == 0
    ET.parse("c.svg")
    assert (tmp_path / "p.html").read_text().startswith("<!DOCTYPE html>")
    assert {len(row.seconds) for row in read_record("r.json").rows} == {3}
    assert bench("--show", "r.json")[1] == out
    code, text, _ = bench("--show", "r.json", "--compare", "r.json")
    assert code == 0
    assert re.search(r"^\| memory: copy, memcpy, .* 1\.00 × \| same +\|$", text, re.MULTILINE)
    code, text, _ = bench("--show", "r.json", "--compare", "r.json", "--json")
    data = json.loads(text)
    assert {each["verdict"] for each in data["comparison"]} == {"same"}
    assert data["schema"] == "oxmerge-bench"


def test_bars_are_drawn_where_a_person_watches(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(write_record(record_of(made_up(1, 2, 3))))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = bench("--show", "r.json")
    assert "█" in out


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("--methods lienar", 2, "there is no method `lienar`"),
        ("--only disks", 2, "`disks` is not among memory, storage,"),
        ("--rounds 0", 2, "is not a whole number from 1"),
        ("--size 7b", 2, "invalid choice"),
        ("nowhere", 2, "`nowhere` is no directory"),
        ("--against other=python", 2, "write `mergekit=PYTHON`"),
        ("--against mergekit=nowhere", 1, "there is no such interpreter"),
        ("--only memory --against mergekit=x", 2, "`--only` leaves them out"),
        ("--svg a --html a", 2, "name the same file"),
        ("--save a --svg ./a", 2, "name the same file"),
        ("--show r.json nowhere", 2, "`--show` measures nothing: `DIR` has no effect"),
        ("--show r.json --only memory", 2, "`--only` has no effect"),
        ("--show r.json --size tiny", 2, "`--size` has no effect"),
        ("--show r.json --quick", 2, "`--quick` has no effect"),
        ("--show r.json --methods ties", 2, "`--methods` has no effect"),
        ("--show r.json --rounds 3", 2, "`--rounds` has no effect"),
        ("--show r.json --against mergekit=x", 2, "`--against` has no effect"),
        ("--save= --quick", 2, "the name of a file is empty"),
        ("--svg nowhere/a.svg", 2, "`nowhere` is no directory"),
        ("--save .", 2, "is a directory"),
        ("--compare nowhere.json", 1, "`nowhere.json`: no such file"),
        ("--compre x", 2, "did you mean"),
    ],
)
def test_errors_are_plain_and_come_first(
    line: str, code: int, message: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it measured")

    monkeypatch.setattr("oxmerge.bench.run.run", never)
    found, out, err = bench(*line.split())
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize("name", ["r.json", "new.json"])
def test_a_place_without_permission_is_refused(
    name: str, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text("old")
    # Permissions do not bind root, who may be running this.
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, out, err = bench("--quick", "--only=memory", "--save", name)
    assert (code, out) == (2, "")
    assert f"`{name}` cannot be written: permission denied" in err


def test_an_interpreter_without_mergekit_is_refused(bench: Any, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho null\n")
    python.chmod(stat.S_IRWXU)
    code, _, err = bench("--against", f"mergekit={python}")
    assert code == 1
    assert "this interpreter has no mergekit" in err


def test_a_program_that_is_no_interpreter_is_refused(bench: Any) -> None:
    code, _, err = bench("--against", "mergekit=/bin/true")
    assert code == 1
    assert "this is no Python" in err


def test_a_disk_that_is_too_small_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SIZES, "1b", replace(demo.SIZES["1b"], vocabulary=1 << 40))
    code, _, err = bench("--size", "1b", "--only", "merge")
    assert code == 1
    assert "of disk are needed" in err
