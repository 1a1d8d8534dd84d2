"""Whether a run that is killed again and again ends as one that never was, bit for bit.

    python scripts/kill_resume.py recipes/quickstart.yaml --kills 100 --nproc 2 train.steps=40

The recipe is run once without a break. Then it is run, killed by SIGKILL at random moments, half of
them in the middle of a save, and resumed until it ends; and so on until there were enough kills.
Every run has to end with the same lines in metrics.jsonl (times and memory aside) and the same
adapter. With several processes half of the kills hit one of them only, and the others have to end
by themselves. Run folders lie under `run` of the recipe, as `whole` and `killed-N`.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qtune import recipe_yaml
from qtune.train.log import MEASURED, read_metrics

POLL_SECONDS = 0.001
# a rank whose neighbour was killed has so long to end
PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Command:
    """How the run is started: recipe and overrides, in so many processes."""

    recipe: Path
    overrides: Sequence[str]
    num_processes: int = 1

    def start(self, folder: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """The run, under way in its folder; what it prints goes to a file beside that."""
        ranks = [] if self.num_processes == 1 else ["--nproc", str(self.num_processes)]
        words = ["train", str(self.recipe), *self.overrides, f"run={folder}", *ranks]
        words += ["--resume"] if resume else []
        with folder.with_name(f"{folder.name}.log").open("ab") as out:
            return subprocess.Popen([sys.executable, "-m", "qtune", *words], stdout=out, stderr=out)


def trained(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """What training left in a run folder, times and memory aside: figures and the adapter."""
    lines = [{k: v for k, v in m.items() if k not in MEASURED} for m in read_metrics(folder)]
    return lines, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def run_whole(command: Command, folder: Path) -> None:
    """Run without a break; raises CalledProcessError where that fails."""
    process = command.start(folder)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def run_killed(command: Command, folder: Path, chance: random.Random, most: int) -> int:
    """Run to the end with at most so many kills; how many there were."""
    kills = 0
    while not (folder / "adapter").exists():
        process = command.start(folder, resume=(folder / "recipe.yaml").exists())
        if kills < most and _reaches(_moment(folder, chance), process):
            _kill(process, chance)
            kills += 1
        elif process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return kills


def _moment(folder: Path, chance: random.Random) -> Iterator[bool]:
    """Says, each time it is asked, whether the moment to kill has come."""
    saving = chance.random() < 0.5
    lines = len(read_metrics(folder)) + chance.randint(1, 8)
    delay, reached = chance.uniform(0, 0.05), None
    while True:
        now = time.monotonic()
        if saving:
            yield any((folder / "checkpoints").glob(".step-*"))
        elif reached is None:
            reached = now if len(read_metrics(folder)) >= lines else None
            yield False
        else:
            yield now - reached >= delay


def _reaches(moment: Iterator[bool], process: subprocess.Popen[bytes]) -> bool:
    """Wait for the moment; False where the run has ended before."""
    for come in moment:
        if process.poll() is not None:
            return False
        if come:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _kill(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Kill the run, all of it or one of several ranks, and see all of it end."""
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ranks = [each for each in whole if "--nproc" in each.cmdline()][1:]
    doomed = [chance.choice(ranks)] if ranks and chance.random() < 0.5 else whole
    for each in doomed:
        each.kill()
    process.wait(PATIENCE_SECONDS)
    _, left = psutil.wait_procs(whole, PATIENCE_SECONDS)
    if left:
        raise SystemExit(f"processes outlived their run: {left}")


def main() -> int:
    """Kill and resume the recipe on the command line; the exit code is 1 where runs differ."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments and resume it.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_intermixed_args()
    command = Command(chosen.recipe, chosen.overrides, chosen.nproc)
    folder = recipe_yaml.load(chosen.recipe, chosen.overrides).run
    folder.mkdir(parents=True)
    run_whole(command, folder / "whole")
    expected, chance = trained(folder / "whole"), random.Random(chosen.seed)
    kills = differing = number = 0
    while kills < chosen.kills:
        number += 1
        place = folder / f"killed-{number}"
        kills += run_killed(command, place, chance, chosen.kills - kills)
        equal = trained(place) == expected
        differing += not equal
        print(f"{place}: {'equal' if equal else 'DIFFERS'}; {kills} kills so far", flush=True)
    print(f"{kills} kills in {number} runs; {number - differing} ended equal in every bit")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
