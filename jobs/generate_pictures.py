"""Generated clips for a person to look at: a film strip with a labelled row for each, and a video of all side by side.

In:   uint8 clips T H W 3 of one shape, RGB, each with a label; a title.
Out:  <stem>.png (a row per clip, up to 8 frames as columns) and <stem>.mp4 (up to 8 clips beside one another).
Cost: memory for the strip and one frame of the video.
Errors: UsageError when a file cannot be written.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError
from pipeline.filmstrip import LabelledClips, draw_strip, write_video


def write_clips(stem: Path, clips: LabelledClips, fps: float, title: str, subtitle: str) -> tuple[Path, Path]:
    """Write <stem>.mp4 and <stem>.png, and return their paths; a still is shown for a second whatever its fps.

    Raises:
        UsageError: the directory cannot be made, or a file not be written.
    """
    video_path, strip_path = stem.with_name(f"{stem.name}.mp4"), stem.with_name(f"{stem.name}.png")
    is_still = len(clips[0][1]) == 1
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        draw_strip(clips, title, subtitle).save(strip_path)
        write_video(video_path, zip(*(clip for _, clip in clips), strict=True), 1 if is_still else fps)
    except OSError as error:
        raise UsageError(f"--output {stem.parent} cannot be written: {error}") from error
    return video_path, strip_path
