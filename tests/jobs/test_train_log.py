import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator

from jobs.train.log import TrainLog
from pipeline.errors import UsageError

STRIP = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SETTINGS = {"kind": "vae", "draw": {"frames": (1, 9), "seed": 3}}


class TrackerError(Exception):
    """What a tracker raises."""


class FakeRun:
    """A W&B run: what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values: dict, *, step: int) -> None:
        self.sent.append((step, values))

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=TrackerError)
        self.started: list[dict] = []
        self.run = FakeRun()

    def init(self, **keywords) -> FakeRun:
        self.started.append(keywords)
        return self.run

    def Image(self, image: np.ndarray) -> tuple:  # noqa: N802
        return ("image", image.shape)


class FakeMlflow(types.ModuleType):
    """One MLflow server with at most one run."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.exceptions = types.SimpleNamespace(MlflowException=TrackerError)
        self.calls: list[tuple] = []
        self.latest: dict[str, float] = {}

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, *, run_id: str | None = None, run_name: str | None = None) -> types.SimpleNamespace:
        self.calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(
            info=types.SimpleNamespace(run_id="r1"), data=types.SimpleNamespace(metrics=dict(self.latest))
        )

    def log_params(self, params: dict) -> None:
        self.calls.append(("params", params))

    def log_metrics(self, values: dict, *, step: int) -> None:
        self.calls.append(("metrics", step, values))
        self.latest |= values

    def log_image(self, image: np.ndarray, *, key: str, step: int) -> None:
        self.calls.append(("image", step, key, image.shape))

    def end_run(self) -> None:
        self.calls.append(("end",))


@pytest.fixture(autouse=True)
def _no_settings_of_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


def open_log(directory: Path, **options) -> TrainLog:
    return TrainLog(directory, run_name="a run", settings=SETTINGS, **options)


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), size_guidance={TENSORS: 0, IMAGES: 0})
    accumulator.Reload()
    return accumulator


def curve(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(directory).Scalars(name)]


def test_tensorboard_shows_scalars_strips_and_settings(tmp_path: Path) -> None:
    log = open_log(tmp_path / "deep" / "logs")
    log.scalars(1, {"loss/l1": 0.5, "train/learning_rate": 0.25})
    log.scalars(2, {"loss/l1": 0.125})
    log.strip(2, "strip/held_out", STRIP)
    log.close()
    assert curve(tmp_path / "deep" / "logs", "loss/l1") == [(1, 0.5), (2, 0.125)]
    assert curve(tmp_path / "deep" / "logs", "train/learning_rate") == [(1, 0.25)]
    shown = events(tmp_path / "deep" / "logs")
    (image,) = shown.Images("strip/held_out")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    (text,) = shown.Tensors("settings/text_summary")
    assert b'"kind": "vae"' in text.tensor_proto.string_val[0]


def test_what_was_logged_is_there_without_close(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.scalars(step, {"loss/l1": 0.5})
        assert [seen for seen, _ in curve(tmp_path, "loss/l1")] == list(range(1, step + 1))
    log.strip(3, "strip", STRIP)
    assert len(events(tmp_path).Images("strip")) == 1
    log.close()


@pytest.mark.parametrize(
    ("resumed_step", "expected"),
    [(3, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]), (0, [(1, 10.0), (4, 40.0), (5, 50.0)])],
)
def test_steps_made_again_after_a_resume_are_seen_once(
    tmp_path: Path, resumed_step: int, expected: list[tuple[int, float]]
) -> None:
    first = open_log(tmp_path)
    for step in range(1, 8):
        first.scalars(step, {"loss/l1": float(step)})
        first.strip(step, "strip", STRIP)
    first.close()
    again = open_log(tmp_path, resumed_step=resumed_step)
    for step in (4, 5) if resumed_step else (1, 4, 5):
        again.scalars(step, {"loss/l1": 10.0 * step})
    again.close()
    assert curve(tmp_path, "loss/l1") == expected
    kept = events(tmp_path)
    images = kept.Images("strip") if "strip" in kept.Tags()["images"] else []
    assert [image.step for image in images] == list(range(1, resumed_step + 1))


def test_a_strip_is_an_rgb_image(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for image in (STRIP[..., 0], STRIP[..., :2], STRIP.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8 H W 3"):
            log.strip(1, "strip", image)
    log.close()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UsageError, match=f"--{package} needs the package {package}.*`pip install {package}`"):
        open_log(tmp_path / "logs", **{package: True})
    assert not (tmp_path / "logs").exists()


def test_weights_and_biases_gets_the_same_and_one_run_for_all_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_log(tmp_path, wandb=True)
    log.scalars(7, {"loss/l1": 0.5})
    log.strip(7, "strip", STRIP)
    assert not fake.run.finished
    log.close()
    open_log(tmp_path, wandb=True, resumed_step=7).close()
    open_log(tmp_path / "another", wandb=True).close()
    assert fake.run.sent == [(7, {"loss/l1": 0.5}), (7, {"strip": ("image", (4, 6, 3))})]
    assert fake.run.finished
    first, again, another = fake.started
    assert first == again
    assert (first["name"], first["config"], first["resume"]) == ("a run", SETTINGS, "allow")
    assert (first["project"], first["dir"]) == ("latentmill", str(tmp_path))
    assert another["id"] != first["id"]
    assert curve(tmp_path, "loss/l1") == [(7, 0.5)]


def test_mlflow_gets_the_same_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    log = open_log(tmp_path, mlflow=True)
    log.scalars(1, {"loss/l1": 0.5})
    log.scalars(2, {"loss/l1": 0.25})
    log.strip(2, "strip", STRIP)
    log.close()
    assert fake.calls == [
        ("experiment", "latentmill"),
        ("start", None, "a run"),
        ("params", {"kind": "vae", "draw.frames": (1, 9), "draw.seed": 3}),
        ("metrics", 1, {"loss/l1": 0.5, "step": 1.0}),
        ("metrics", 2, {"loss/l1": 0.25, "step": 2.0}),
        ("image", 2, "strip", (4, 6, 3)),
        ("end",),
    ]
    fake.calls.clear()
    log = open_log(tmp_path, mlflow=True, resumed_step=1)
    for step in (2, 3):
        log.scalars(step, {"loss/l1": 0.125})
        log.strip(step, "strip", STRIP)
    log.close()
    assert fake.calls == [
        ("start", "r1", None),
        ("metrics", 3, {"loss/l1": 0.125, "step": 3.0}),
        ("image", 3, "strip", (4, 6, 3)),
        ("end",),
    ]


def test_a_project_that_the_trackers_own_settings_name_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    open_log(tmp_path, wandb=True, mlflow=True).close()
    assert wandb.started[0]["project"] == "ours"
    assert "experiment" not in [call[0] for call in mlflow.calls]


def test_a_tracker_that_does_not_take_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments, **_keywords) -> None:
        raise TrackerError("no api key")

    wandb, mlflow = FakeWandb(), FakeMlflow()
    wandb.init = mlflow.start_run = refuse
    for name, fake in (("wandb", wandb), ("mlflow", mlflow)):
        monkeypatch.setitem(sys.modules, name, fake)
        with pytest.raises(UsageError, match=f"--{name}: the run cannot be started: no api key"):
            open_log(tmp_path, **{name: True})
    assert not (tmp_path / "mlflow_run_id").exists()
