"""The numbers of an evaluation: rates, codes, the bicubic baseline, means, and records as JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation import (
    Baseline,
    ClipResult,
    CodeCounts,
    CodecResult,
    Evaluation,
    FailedClip,
    LatentResult,
    Rate,
    Scores,
    ShownClip,
    bicubic,
    bicubic_size,
    mean_scores,
    score,
)
from pipeline.quality import flicker, psnr, ssim, temporal_psnr


class TestRate:
    def test_is_per_pixel_and_against_24_bits(self) -> None:
        rate = Rate(numbers=100, bits=1600, pixels=800)
        assert (rate.numbers_per_pixel, rate.bits_per_pixel, rate.compression_ratio) == (0.125, 2.0, 12.0)

    def test_of_a_set_weighs_clips_by_their_pixels(self) -> None:
        total = Rate(10, 160, 100) + Rate(30, 240, 900)
        assert total == Rate(40, 400, 1000)
        assert total.bits_per_pixel == 0.4


class TestCodes:
    def test_usage_and_perplexity_over_all_clips(self) -> None:
        counts = CodeCounts(8)
        counts.update(torch.tensor([[0, 0], [1, 5]]))
        counts.update(torch.tensor([0, 5]))
        shares = (3 / 6, 1 / 6, 2 / 6)
        usage = counts.usage()
        assert (usage.seen, usage.used, usage.usage) == (6, 3, 3 / 8)
        assert usage.perplexity == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))

    def test_codes_chosen_equally_often_are_their_own_perplexity(self) -> None:
        counts = CodeCounts(2**40)  # no table of all codes is made
        counts.update(torch.arange(12).repeat(3) * 2**30)
        assert counts.usage().perplexity == pytest.approx(12)

    def test_of_nothing_is_nothing(self) -> None:
        assert CodeCounts(4).usage().used == 0


class TestBicubic:
    @given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 6000))
    def test_the_size_is_the_smallest_of_its_neighbours_that_is_not_below_the_values(
        self, height: int, width: int, values: float
    ) -> None:
        rows, columns = bicubic_size(height, width, values)
        wanted = min(values / 3, height * width)
        assert 1 <= rows <= height
        assert 1 <= columns <= width
        assert rows * columns >= wanted
        ideal = math.sqrt(wanted / (height * width))
        assert abs(rows - ideal * height) <= 1
        assert abs(columns - ideal * width) <= 1
        nearer = [(rows - 1, columns), (rows, columns - 1)]
        for smaller in nearer:
            on_grid = smaller[0] >= max(1, math.floor(ideal * height)) and smaller[1] >= max(
                1, math.floor(ideal * width)
            )
            assert not on_grid or smaller[0] * smaller[1] < wanted

    def test_known_sizes(self) -> None:
        assert bicubic_size(64, 64, 3 * 16 * 16) == (16, 16)
        assert bicubic_size(64, 32, 3 * 16 * 8) == (16, 8)
        assert bicubic_size(64, 64, 3 * 16 * 16 + 1) in ((16, 17), (17, 16))
        assert bicubic_size(8, 8, 10**9) == (8, 8)

    def test_a_flat_clip_survives_and_detail_does_not(self) -> None:
        clip = np.full((2, 16, 12, 3), 77, np.uint8)
        assert (bicubic(clip, (3, 2)) == 77).all()
        rows = np.indices((16, 12)).sum(axis=0) % 2 * 255
        board = np.repeat(rows[None, ..., None], 3, axis=3).astype(np.uint8)
        assert np.abs(bicubic(board, (4, 3)).astype(int) - 127).max() < 40
        assert (bicubic(board, (16, 12)) == board).all()

    def test_what_is_too_fine_becomes_its_mean(self) -> None:
        stripes = np.zeros((1, 16, 32, 3), np.uint8)
        stripes[:, :, ::4] = 200  # plain bicubic sampling would fall between them
        made = bicubic(stripes, (4, 8)).astype(int)
        assert np.abs(made[:, :, 8:24] - 50).max() <= 8

    def test_frames_are_made_small_one_by_one(self) -> None:
        clip = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
        for number in range(3):
            assert (bicubic(clip, (5, 5))[number] == bicubic(clip[number : number + 1], (5, 5))[0]).all()


class TestScores:
    def test_are_those_of_quality_and_a_network(self) -> None:
        draw = np.random.default_rng(1)
        source, made = (draw.integers(0, 256, (3, 12, 12, 3), np.uint8) for _ in range(2))
        found = score(source, made, lambda first, second: float(first.mean() - second.mean()))
        pair = source, made
        assert found == Scores(
            psnr(*pair), ssim(*pair), temporal_psnr(*pair), flicker(*pair), float(source.mean() - made.mean())
        )
        assert score(source, made).lpips is None

    def test_a_still_takes_no_part_in_the_means_of_changes(self) -> None:
        mean = mean_scores([Scores(20, 0.5, None, None), Scores(30, 0.7, 40, 2), Scores(40, 0.9, 50, 4)])
        assert mean == Scores(30, pytest.approx(0.7), 45, 3, None)  # type: ignore[arg-type]


def test_an_evaluation_is_json_without_its_pictures() -> None:
    scores = Scores(30.0, 0.9, 35.0, 1.0)
    picture = np.zeros((2, 2, 3), np.uint8)
    codes = CodeCounts(4)
    codes.update(torch.tensor([1, 1]))
    evaluation = Evaluation(
        source="here",
        encoder="vae",
        fingerprint="f",
        codecs=(CodecResult("vae", Rate(1, 16, 4), scores),),
        latent=LatentResult(kl=0.5, codes=(codes.usage(),)),
        clips=(ClipResult("a", "s.tar", 0, "5x2x2", (scores,), 0.5),),
        failed=(FailedClip("b", "s.tar", None, "bad_media", "cut off"),),
        filtered={"short_video": 2},
        baseline=Baseline(3, 1, ("s.tar",)),
        shown=(ShownClip("a", 0, picture, (picture,), (scores,)),),
    )
    tree = json.loads(json.dumps(evaluation.to_tree(), allow_nan=False))
    assert "shown" not in tree
    assert tree["codecs"][0]["rate"] == {
        "numbers": 1, "bits": 16, "pixels": 4,
        "numbers_per_pixel": 0.25, "bits_per_pixel": 4, "compression_ratio": 6,
    }  # fmt: skip
    assert tree["latent"]["codes"] == [{"codebook_size": 4, "seen": 2, "used": 1, "perplexity": 1.0, "usage": 0.25}]
    assert tree["clips"][0]["scores"][0]["temporal_psnr"] == 35
    assert (tree["failed"][0]["reason"], tree["filtered"], tree["baseline"]["failed"]) == (
        "bad_media",
        {"short_video": 2},
        1,
    )
