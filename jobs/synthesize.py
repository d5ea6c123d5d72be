"""`synthesize`: practice tars of generated video.

In:   a directory and a seed.
Out:  WebDataset tars in it.
Cost: that of pipeline.synthetic.
Errors: UsageError when the directory cannot be written.
"""

from __future__ import annotations

from jobs.generate_config import Synthesize
from pipeline.errors import UsageError


def run_synthesize(command: Synthesize) -> int:
    """`latentmill synthesize --output DIR`."""
    from pipeline.synthetic import write_shards

    try:
        made = write_shards(command.output, command.num_shards, command.samples_per_shard, command.seed)
    except OSError as error:
        raise UsageError(f"--output {command.output} cannot be written: {error}") from error
    for path in made.paths:
        print(path)
    print(
        f"{made.num_samples} samples, {len(made.broken)} broken on purpose: {', '.join(sorted(made.broken.values()))}"
    )
    return 0
