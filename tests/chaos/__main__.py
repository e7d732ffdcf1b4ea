"""`make chaos`: half an hour of storm; prints the summary and writes it to a file. Wants a machine of its own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import recipe
from chaos.storm import draw
from chaos.whole import keep, weather
from orchestrator.data.samples import fetch_food

# What a machine of two cores manages. With fewer steps the jobs end before all faults came.
_FAULTS_A_MINUTE, _STEPS_A_FAULT = 2.0, 14
_FEWEST_STEPS = 60


def main() -> int:
    """0 if nothing is wrong afterwards."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=28.0, help="about how long the storm lasts")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos.md"), help="file for the summary")
    chosen = parser.parse_args()
    number = round(chosen.minutes * _FAULTS_A_MINUTE)
    # Two stages; the students of the second train side by side.
    steps = max(_FEWEST_STEPS, number * _STEPS_A_FAULT // 2)
    with tempfile.TemporaryDirectory(prefix="orchestrator-chaos-") as name:
        folder = Path(name)
        fetch_food(folder / "food")
        pipeline = recipe.pipeline(folder / "food", steps, students=2)
        faults, seconds = draw(number, chosen.seed), 120 * chosen.minutes
        try:
            text, wrong = weather(
                folder, pipeline, faults, seed=chosen.seed, machines=3, seconds=seconds, say=_say
            )
        except BaseException:
            keep(folder, chosen.out.with_suffix(".logs"))
            raise
        if wrong:
            keep(folder, chosen.out.with_suffix(".logs"))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text)
    _say(text)
    return 1 if wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
