"""`mfm configs`: the configs that come with the package, and copies of them to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mfm_lightning.commands.errors import CommandLineError, unknown


def configs(
    action: Literal["list", "copy"] = "list",
    name: str | None = None,
    output: Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """List the packaged configs, or copy one to edit.

    Args:
        action: list, or copy.
        name: of the config that is copied, such as digits/mfm.
        output: where the copy goes; configs/NAME.yaml of the current folder if left out.
        overwrite: of a file that is there.

    Raises:
        CommandLineError: for a name that there is not.
        FileExistsError: if a file is there already.
    """
    from mfm_lightning.utils.configs import SHIPPED, packaged

    known = packaged()
    if action == "list":
        if name is not None:
            raise CommandLineError(f"mfm configs list takes no name, got {name!r}: mfm configs copy {name} copies one")
        width = max(map(len, known))
        for each, about in known.items():
            print(f"{each:<{width}}  {about}")
        print(
            "\nmfm fit --config digits/mfm runs one from anywhere (benchmarks/ are those of mfm benchmark); "
            "mfm configs copy NAME writes one to edit."
        )
        return
    if name is None:
        raise CommandLineError("mfm configs copy needs a name, such as digits/mfm: mfm configs lists them")
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in known:
        raise CommandLineError(f"{unknown('config', name, known)} (mfm configs lists all)")
    target = Path("configs", f"{name}.yaml") if output is None else output
    if target.is_dir():
        target = target / f"{Path(name).name}.yaml"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already: give another path, or --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((SHIPPED / f"{name}.yaml").read_text())
    print(target)
