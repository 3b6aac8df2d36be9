"""``expert-router calibrate fit FOLDER``: profiles of what ``calibrate measure`` recorded."""

from pathlib import Path

from rich.console import Console

from calibrate.fit.profiles import write_profiles
from calibrate.measure.files import META, MeasurementError, MeasurementFolder
from calibrate.measure.measured_profile import fit_folder
from calibrate.measure.report import print_measured


def measured_folders(folder: Path) -> list[Path]:
    """Return a folder of one measurement itself, or those right below it.

    Raises:
        MeasurementError: there are none.
    """
    found = [folder] if (folder / META).exists() else sorted(path.parent for path in folder.glob(f"*/{META}"))
    if not found:
        raise MeasurementError(f"{folder}: no measurement in it; expert-router calibrate measure writes one")
    return found


def fit_folders(folder: Path, out: Path, messages: Console, console: Console) -> None:
    """Fit and print every measurement of a folder, and write one profile each; exits with 2 where that fails."""
    try:
        fits = {path.name: fit_folder(MeasurementFolder.existing(path)) for path in measured_folders(folder)}
        written = write_profiles((found.profile for found in fits.values()), out)
    except (MeasurementError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    for name, found in fits.items():
        print_measured(name, found, console)
    messages.print(f"wrote {len(written)} profiles to {out}", highlight=False)
