"""`latentmill bench encode`: its sets, the scripts it compares with, what it reads off a run, and its tables."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.__main__ import main
from jobs.bench import encode as bench_encode
from jobs.bench import encode_bare, encode_runs
from jobs.bench.config import ENCODE_ENCODERS, ENCODE_SETS, OTHERS, OURS, BenchEncode
from jobs.bench.encode import _held_to, sleep_seconds, tars_for
from jobs.bench.encode_bare import encoder_alone, stages
from jobs.bench.encode_child import CONTENDERS, Batcher, Work, decode_decord, decode_pyav
from jobs.bench.encode_report import against, bound_seconds, faults, goals, over_bound, slower_of_ours, to_markdown
from jobs.bench.encode_runs import Job, bare, bare_stages, run_contender, samples_of
from jobs.bench.encode_sets import REAL, SETS, SLEEPING, write_tars
from jobs.bench.processes import Watched, watch
from jobs.prepare import open_encoder
from pipeline.buckets import Bucket
from pipeline.decode.backend import decode_windows
from pipeline.decode.limits import DecodeLimits
from pipeline.decode.records import ClipShape, DecodedClip, DecodeRequest, Grid, MediaSource, Window
from pipeline.errors import UsageError
from pipeline.plan import Unit, load_plan
from pipeline.storage import open_storage
from pipeline.store import open_header
from tests.clips import numbered_video, read_number, stored

ENCODER = "rehearsal:4x8x8x16@100000"


def run(clips: int = 100, seconds: float = 10.0, **more: Any) -> dict[str, Any]:
    about = {
        "index_seconds": 0.5,
        "startup_seconds": 0.5,
        "total_seconds": seconds + 1,
        "cpu_seconds": 3.0,
        "peak_mib": 50.0,
    }
    return {"clips": clips, "seconds": seconds, "cpu_seconds": 3.0, "peak_mib": 50.0, **about, **more}


def turn(**cells: dict[str, Any]) -> dict[str, Any]:
    bare = {"decode_cpu_seconds": 0.12, "encode_cpu_seconds": 0.02, "write_cpu_seconds": 0.02, "encoder_seconds": 0.05}
    names = {name.replace("_", "-"): cell for name, cell in cells.items()}
    return {"bare": bare, **names}


def case(*rounds: dict[str, Any], encoder: str = "balanced", **more: Any) -> dict[str, Any]:
    sleeps = encoder in SLEEPING
    about = {
        "set": "short",
        "about": "clips",
        "encoder": encoder,
        "source": ENCODER if sleeps else "",
        "runs_on": "nothing" if sleeps else "cpu",
    }
    return {**about, "clips": 100, "good_clips": 100, "rounds": list(rounds), **more}


ABOUT = {
    "command": "c", "date": "d", "commit": "abc", "hardware": "h", "versions": {"av": "18"}, "repetitions": 1,
    "cores": 2, "decode_workers": 2, "encode_threads": 2, "sleeping_threads": 1, "device": "cpu",
    "compute_dtype": "float32",
}  # fmt: skip


class TestReport:
    def test_the_bound_is_the_longer_of_cpu_and_sleep(self) -> None:
        one = turn()
        assert bound_seconds(case(one), one, "local", 2) == pytest.approx(8.0)  # 100 x 0.16 / 2 cores
        assert bound_seconds(case(one), one, "local", 8) == pytest.approx(5.0)  # asleep
        assert bound_seconds(case(one), one, "ray-2", 8) == pytest.approx(2.5)
        assert bound_seconds(case(one, encoder="tiny-vae"), one, "local", 8) == pytest.approx(2.0)  # computes

    def test_an_encoder_on_a_gpu_bounds_a_job_and_is_what_its_speed_is_held_against(self) -> None:
        one = turn(local=run(seconds=8.2), ray_1=run(seconds=8.5))
        on_gpu = case(one, encoder="wan-2.1-full", runs_on="cuda")
        assert bound_seconds(on_gpu, one, "local", 2) == pytest.approx(8.0)
        assert bound_seconds(on_gpu, one, "local", 8) == pytest.approx(5.0)
        (goal,) = [goal for goal in goals([on_gpu], 8) if goal.name.startswith("GPU")]
        assert goal.measured.median == pytest.approx(5 / 8.5)
        assert not any(goal.name.startswith("real") for goal in goals([on_gpu], 8))
        page = to_markdown({"about": {**ABOUT, "device": "cuda (H)"}, "cases": [on_gpu]})
        assert "encoders that compute run on\n  cuda (H)" in page
        assert "computes on cuda, random weights" in page
        assert "3.2 cores decode, call it and write as fast as it encodes." in page
        assert "3.2 cores decode, batch and write as fast as it sleeps." in to_markdown(
            {"about": ABOUT, "cases": [case(one)]}
        )

    def test_ratios_are_taken_within_rounds_and_a_dead_contender_has_none(self) -> None:
        rounds = [
            turn(local=run(seconds=10), ray_1=run(seconds=12), plain=run(seconds=24), decord={"error": "died: x"}),
            turn(local=run(seconds=20), ray_1=run(seconds=18), plain=run(seconds=60), decord={"error": "died: x"}),
        ]
        assert slower_of_ours(rounds[0]) == pytest.approx(100 / 12)
        found = against(case(*rounds), "plain")
        assert found is not None
        assert (found.low, found.high) == pytest.approx((2.0, 3.0))
        assert against(case(*rounds), "decord") is None
        assert over_bound(case(*rounds), "decord", 2) is None
        over = over_bound(case(rounds[0]), "ray-1", 2)
        assert over is not None
        assert over.median == pytest.approx(12 / 8)

    def test_goals_take_the_worst_row_and_leave_out_what_was_not_run(self) -> None:
        busy = turn(local=run(seconds=8.4, busy=0.99), ray_1=run(seconds=8.6, busy=0.97), ray_data=run(seconds=10.0))
        found = {goal.name: goal for goal in goals([case(busy), case(busy, encoder="encode-bound")], 2)}
        assert found["seconds / work-conserving bound"].measured.median == pytest.approx(8.6 / 8)
        assert found["seconds / work-conserving bound"].verdict == "yes"
        assert found["encoder busy, sleeping, encode-bound"].measured.median == 0.97
        assert found["encoder busy, sleeping, encode-bound"].verdict == "no"
        assert found["Ray / --local, seconds"].measured.median == pytest.approx(8.6 / 8.4)
        assert found["ours / Ray Data, short:balanced"].verdict == "no"
        assert not any("long:" in name or "real" in name for name in found)

    def test_who_is_ahead_who_died_and_who_lost_clips_is_told(self) -> None:
        cells = {
            "local": run(), "ray_1": run(), "plain": run(seconds=5), "dataloader": run(clips=98),
            "decord": {"error": "died: Segmentation | fault"}, "ray_data": run(clips=103),
        }  # fmt: skip
        page = to_markdown({"about": ABOUT, "cases": [case(turn(**cells))]})
        rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
        assert "- short with balanced: plain script is ahead, ours has 0.50" in page
        assert rows["plain script"].endswith("AHEAD of ours |")
        assert rows["DataLoader, PyAV"].endswith("lost 2 good clips |")
        assert rows["DataLoader, decord"].endswith("died: Segmentation / fault |")
        assert rows["Ray Data"].endswith("saved 3 clips of broken videos |")
        assert "Encoder: **balanced** (sleeps, uses no CPU), `rehearsal:" in page
        assert len({line.count("|") for name, line in rows.items() if name in ("contender", "Ray Data")}) == 1

    def test_nobody_ahead_is_said(self) -> None:
        page = to_markdown({"about": ABOUT, "cases": [case(turn(local=run(), plain=run(seconds=20)))]})
        assert "No other contender is ahead of ours in any row." in page
        alone = to_markdown({"about": ABOUT, "cases": [case(turn(local=run(), decord={"error": "died: x"}))]})
        assert "No other contender" not in alone

    def test_one_of_ours_that_dies_or_loses_clips_is_a_fault(self) -> None:
        died = case(turn(local=run(), ray_1={"error": "died: gone"}, plain=run(seconds=20)))
        assert slower_of_ours(died["rounds"][0]) is None
        assert against(died, "plain") is None
        lost = case(turn(local=run(clips=99), ray_1=run()), encoder="tiny-vae")
        result = {"about": ABOUT, "cases": [died, lost, case(turn(local=run(), plain=run(clips=1)))]}
        assert faults(result) == [
            "short with balanced: **ours, Ray, 1 encode worker**: died: gone",
            "short with tiny-vae: **ours, --local**: lost 1 good clips",
        ]
        assert to_markdown(result).count("**FAULT** short with") == 2

    def test_a_computing_encoder_is_held_against_what_decode_leaves_of_it(self) -> None:
        """The encoder alone makes 20 clips a second, and takes 0.02 of 0.16 CPU seconds."""
        computing = case(turn(local=run(seconds=50), ray_1=run(seconds=80)), encoder="tiny-vae")
        (goal,) = [goal for goal in goals([computing], 2) if goal.name.startswith("real encoders")]
        assert goal.measured.median == pytest.approx((100 / 80) / (20 * 0.02 / 0.16))

    def test_a_case_that_failed_says_so_and_counts_nowhere_else(self) -> None:
        failed = {"set": "huge", "about": "few clips", "encoder": "wan-2.1-full", "error": "CUDA out of memory"}
        measured = case(turn(local=run(), plain=run(seconds=5)))
        page = to_markdown({"about": ABOUT, "cases": [failed, measured]})
        rest = page.replace("## huge: few clips\n\nEncoder: **wan-2.1-full**. Not measured: CUDA out of memory\n\n", "")
        assert rest == to_markdown({"about": ABOUT, "cases": [measured]}) != page
        assert "No other contender" not in to_markdown({"about": ABOUT, "cases": [failed]})


class TestScripts:
    @pytest.fixture
    def work(self, tmp_path: Path) -> Work:
        video = stored(tmp_path, numbered_video(num_frames=60))
        return Work(video.path, "key", video.offset, video.size_bytes, (0, 7, 40), 5, 96, 96, (96, 96))

    def test_every_decoder_gives_the_wanted_frames(self, work: Work) -> None:
        wanted = [[start + k for k in range(5)] for start in work.starts]
        for decode in (decode_pyav, decode_decord):
            assert [[read_number(frame) for frame in clip] for clip in decode(work)] == wanted

    def test_a_bad_video_has_no_clips(self, tmp_path: Path) -> None:
        path = tmp_path / "shard"
        path.write_bytes(b"no video at all" * 100)
        work = Work(str(path), "key", 0, 1500, (0,), 5, 96, 96, (96, 96))
        assert decode_pyav(work) == []
        assert decode_decord(work) == []

    def test_clips_of_one_shape_go_into_one_call_and_none_is_left(self) -> None:
        saved: dict[str, torch.Tensor] = {}
        spec = {
            "encoder": ENCODER, "device": "cpu", "compute_dtype": "float32", "encode_threads": torch.get_num_threads(),
            "batch_size": 2,
        }  # fmt: skip
        batcher = Batcher(spec, saved.__setitem__)
        clips = {name: np.full((frames, 16, 16, 3), 7, np.uint8) for name, frames in (("a", 5), ("b", 1), ("c", 5))}
        for number, (name, clip) in enumerate(clips.items()):
            batcher.add(name, clip)
            assert sorted(saved) == ([], [], ["a", "c"])[number]
        batcher.finish()
        assert {name: tuple(latent.shape) for name, latent in saved.items()} == {
            "a": (16, 2, 2, 2), "b": (16, 1, 2, 2), "c": (16, 2, 2, 2),
        }  # fmt: skip

    def test_there_is_a_script_for_every_name(self) -> None:
        assert set(CONTENDERS) == set(OTHERS)
        assert BenchEncode().contenders == (*OURS, *OTHERS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Job:
    scratch = tmp_path_factory.mktemp("job")
    chosen = SETS["broken"]
    tars = tuple(write_tars("broken", videos, scratch / "tars", 2))
    flags = (*chosen.flags, "--batch-size", "4")
    job = Job(
        "broken:x", scratch, tars, flags, 4, ENCODER, "cpu", "float32", 2, 1, 200.0, good_clips=2 * chosen.good_clips
    )
    store = scratch / "pilot"
    for command in (["index", str(tars[0]), "--local"], ["plan", "--encoder", ENCODER, *flags]):
        assert main([*command, "--store", str(store)]) == 0
    samples, clips, megapixels = samples_of(store)
    assert (len(samples), clips) == (40, 39)  # the damage inside a video is not in the index
    assert megapixels == pytest.approx(39 * 17 * 128 * 128 / 1e6)
    return Job(**{**vars(job), "samples": tuple(samples), "clips": 2 * clips})


class TestRuns:
    """One set, broken videos included, through ours and a script, without the whole command."""

    @pytest.mark.slow
    def test_ours_writes_every_good_clip_and_tells_its_times(self, job: Job) -> None:
        cell = run_contender(job, "local")
        assert cell["clips"] == job.good_clips
        assert 0 < cell["seconds"] < cell["total_seconds"]
        times = [cell[f"{part}seconds"] for part in ("", "index_", "startup_")]
        assert min(times) > 0
        assert sum(times) == pytest.approx(cell["total_seconds"])
        assert 0 < cell["busy"] < 1
        assert cell["workers"] == 1
        assert cell["cpu_seconds"] > 0.5
        assert not (job.scratch / "run").exists()

    @pytest.mark.slow
    def test_the_plain_script_survives_and_saves_what_it_can_open(self, job: Job) -> None:
        cell = run_contender(job, "plain")
        assert cell["clips"] in range(job.good_clips, job.clips + 1)
        assert 0 < cell["seconds"] < cell["total_seconds"]

    @pytest.mark.slow
    def test_stages_beside_an_encoder_on_a_gpu_encode_with_one_that_takes_no_time(
        self, job: Job, tmp_path: Path
    ) -> None:
        """The job's own encoder is never opened: nothing is at its path, and there is no GPU."""
        on_gpu = dataclasses.replace(job, scratch=tmp_path, encoder=str(tmp_path / "none"), device="cuda")
        found = bare_stages(on_gpu, job.scratch / "pilot", 1)
        assert found["decode_cpu_seconds"] > 10 * found["encode_cpu_seconds"] > 0

    @pytest.mark.slow
    def test_a_contender_that_dies_is_a_cell(self, job: Job) -> None:
        broken = Job(**{**vars(job), "encoder": "rehearsal:nonsense"})
        assert "died: " in run_contender(broken, "local")["error"]
        assert "rehearsal:nonsense" in run_contender(broken, "plain")["error"]

    @pytest.mark.slow
    def test_the_bare_stages_do_the_whole_plan(self, job: Job, tmp_path: Path) -> None:
        storage = open_storage(str(job.scratch / "pilot"))
        plan, encoder = load_plan(storage, open_header(storage).recipe), open_encoder("rehearsal:4x8x8x16@10")
        found = stages(storage, tmp_path, plan, encoder)
        asleep = 39 * 17 * 128 * 128 / 10e6
        assert found["clips"] == 39
        assert found["encode_cpu_seconds"] < asleep < found["encode_wall_seconds"]
        assert found["decode_cpu_seconds"] > 0.05
        assert found["write_cpu_seconds"] > 0
        alone = encoder_alone(plan, encoder, 1)
        assert alone["clips"] == 39
        assert alone["encoder_cpu_seconds"] < asleep < alone["encoder_wall_seconds"] < 2 * asleep


def test_the_sets_hold_the_clips_that_they_promise(tmp_path: Path, videos: Path) -> None:
    first, second = write_tars("mixed", videos, tmp_path / "mixed", 2)
    assert first.stat().st_ino == second.stat().st_ino
    with tarfile.open(first) as tar:
        names = tar.getnames()
    assert len(names) == SETS["mixed"].good_clips == 36
    assert {name.partition(".")[2] for name in names} == {"mp4", "jpg"}
    assert set(ENCODE_SETS) == set(SETS)
    assert set(ENCODE_ENCODERS) == {*SLEEPING, *REAL}


def test_damage_in_the_broken_set_is_in_the_first_clip(tmp_path: Path, videos: Path) -> None:
    (path,) = write_tars("broken", videos, tmp_path / "broken", 1)
    outcomes = []
    with tarfile.open(path) as tar:
        for member in tar.getmembers()[26:29]:
            source = MediaSource(str(path), member.offset_data, member.size, "video")
            request = DecodeRequest(source, Grid(), (Window(0, 17),), ClipShape(32, 32))
            outcomes += decode_windows(request, DecodeLimits())
    assert [isinstance(outcome, DecodedClip) for outcome in outcomes] == [True, False, True]


class TestWatch:
    def test_it_counts_descendants_and_leaves_none(self, tmp_path: Path) -> None:
        child = "import time; x = b'x' * (120 << 20)\nwhile time.process_time() < 0.8: pass\ntime.sleep(99)"
        program = (
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
            "print(child.pid); print('ready', file=sys.stderr); time.sleep(3)"
        )
        watched = watch([sys.executable, "-c", program], 30)
        assert watched.returncode == 0
        assert watched.peak_mib > 120
        assert watched.cpu_seconds > 0.6
        assert 0 < (watched.when("^ready") or 0) < watched.seconds - 1.5
        assert watched.when("never said") is None
        state = Path(f"/proc/{watched.stdout[0][1].strip()}/stat")  # dead, or a zombie where nobody reaps orphans
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    def test_it_ends_what_runs_past_its_time(self) -> None:
        began = time.monotonic()
        watched = watch([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
        assert watched.returncode == -9
        assert watched.cause.startswith("killed after ")
        assert time.monotonic() - began < 10


A_JOB = Job(
    "huge:x", Path("scratch"), (Path("0.tar"),), (), 1, ENCODER, "cpu", "float32", 16, 1, 9.0,
    samples=({"num_frames": 81, "height": 480, "width": 832}, {"num_frames": 17, "height": 128, "width": 128}),
)  # fmt: skip


class TestBare:
    def test_the_encoder_alone_takes_full_batches_and_has_met_every_bucket(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small, large = Bucket(1, 16, 16), Bucket(5, 16, 16)
        rows = {Unit(small, 0): 8, Unit(small, 1): 3, Unit(large, 0): 5}
        plan: Any = SimpleNamespace(
            units=lambda: iter(rows), num_rows=rows.get, recipe=SimpleNamespace(batch_size={small: 4, large: 2}.get)
        )
        monkeypatch.setattr(encode_bare, "num_callers", lambda *asked: 2 if asked == (encoder, plan.recipe, 6) else 1)
        threads = set[int]()
        calls: list[tuple[int, ...]] = []

        def encode(frames: torch.Tensor) -> None:
            calls.append(tuple(frames.shape[:2]))
            threads.add(torch.get_num_threads())
            time.sleep(0.02)

        encoder: Any = SimpleNamespace(encode=encode)
        found = encoder_alone(plan, encoder, 1)
        assert calls == [(4, 1), (2, 5)] + [(4, 1)] * 3 + [(2, 5)] * 3
        assert found["clips"] == 16
        assert found["encoder_cpu_seconds"] < 0.12 <= found["encoder_wall_seconds"]
        calls.clear()
        threads.clear()
        found = encoder_alone(plan, encoder, 6)
        assert calls == [(4, 1)] * 2 + [(2, 5)] * 2 + [(4, 1)] * 3 + [(2, 5)] * 3
        assert threads == {3}
        assert 0.08 <= found["encoder_wall_seconds"] < 0.12  # one, one and two turns of two calls

    @pytest.mark.parametrize(("device", "encode_cpu"), [("cpu", 0.5), ("cuda", 0.5 + 0.25)])
    def test_what_an_encoder_on_a_gpu_takes_of_the_cpu_is_in_the_encode(
        self, device: str, encode_cpu: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        measured = {
            "stages": {"clips": 2, "decode_cpu_seconds": 4.0, "encode_cpu_seconds": 1.0, "write_cpu_seconds": 0.2},
            "encoder": {"clips": 4, "encoder_cpu_seconds": 1.0, "encoder_wall_seconds": 3.0},
        }
        monkeypatch.setattr(encode_runs, "_bare", lambda job, what, *_: measured[what])
        found = bare(dataclasses.replace(A_JOB, device=device), tmp_path, 2)
        assert found["encode_cpu_seconds"] == pytest.approx(encode_cpu)
        assert found["decode_cpu_seconds"] == pytest.approx(2.0)
        assert found["encoder_seconds"] == pytest.approx(0.75)

    def test_a_case_whose_bare_stages_die_ends_no_other(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 90 GiB\n"

        def rounds(_: BenchEncode, name: str, *__: Any) -> dict[str, Any]:
            if name == "huge:balanced":
                encode_runs._require(Watched(1, 0.0, 1.0, (), ((0.5, "Traceback\n"), (0.5, said)), 1.0, 1.0))
            return case(turn(local=run()))

        monkeypatch.setattr(bench_encode, "_rounds", rounds)
        flags = ["--hardware", "here", "--cases", "huge:balanced", "short:balanced", "--device", "cpu"]
        assert main(["bench", "encode", "--output", str(tmp_path), *flags]) == 1
        (path,) = tmp_path.glob("encode_here_*.json")
        failed, measured = json.loads(path.read_text())["cases"]
        assert failed["error"] == said.strip()
        assert measured["clips"] == 100
        assert f"Not measured: {said}" in path.with_suffix(".md").read_text()
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("workers", "told"), [(1, True), (2, False)])
def test_a_row_of_two_workers_says_where_there_was_one(workers: int, told: bool) -> None:
    page = to_markdown({"about": ABOUT, "cases": [case(turn(local=run(), ray_2=run(workers=workers)))]})
    assert ("had one worker at its end" in page) == told


def test_an_encoder_on_a_gpu_has_one_thread_unless_told_otherwise() -> None:
    assert BenchEncode(cores=6).threads_on("cuda") == 1
    assert BenchEncode(cores=6).threads_on("cpu") == 6
    assert BenchEncode(encode_threads=3).threads_on("cuda") == 3
    with pytest.raises(UsageError, match="--encode-threads must not be negative"):
        BenchEncode(encode_threads=-1)


def test_every_core_that_contenders_are_held_to_decodes() -> None:
    assert BenchEncode(cores=6).decode_processes == 6
    assert BenchEncode(cores=6, decode_workers=2).decode_processes == 2
    with pytest.raises(UsageError, match="--decode-workers must not be negative"):
        BenchEncode(decode_workers=-1)


def test_a_set_is_as_large_as_its_slower_stage_asks() -> None:
    cost = {"decode_cpu_seconds": 0.12, "encode_cpu_seconds": 0.04}
    assert sleep_seconds(cost, 4, "balanced") == pytest.approx(0.03)
    assert sleep_seconds(cost, 4, "encode-bound") == pytest.approx(0.09)
    assert sleep_seconds(cost, 4, "decode-bound") == pytest.approx(0.01)
    assert tars_for(60, 16, cost, 4, 0.0) == 94  # 60 s of 0.04 s are 1,500 clips
    assert tars_for(60, 16, cost, 4, 0.09) == 42
    assert tars_for(0.1, 16, cost, 4, 0.0) == 2


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with _held_to(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(UsageError, match="--cores 100000"), _held_to(100000):
        pass


def test_wrong_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "encode", "--output", str(tmp_path / "gone")]) == 2
    assert "is no directory" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--cases short:gpu: say SET:ENCODER"):
        BenchEncode(cases=("short:gpu",))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_small_run_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--cases", "short:balanced", "--seconds-per-set", "1", "--repetitions", "1", "--hardware", "here"]
    assert main(["bench", "encode", "--output", str(tmp_path), *flags]) == 0
    (path,) = tmp_path.glob("encode_here_*.json")
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    (case_run,) = json.loads(path.read_text())["cases"]
    (only,) = case_run["rounds"]
    for name in (*OURS, *OTHERS):
        assert only[name].get("clips") == case_run["good_clips"], (name, only[name])
