"""`mfm data`: what a config or a file of prompts will give, before anything is run on it."""

from __future__ import annotations

from pathlib import Path

from mfm_lightning.commands.errors import CommandLineError


def data(
    *,
    config: Path | None = None,
    output: Path = Path("outputs/data"),
    pictures: int = 64,
    prompts: str | None = None,
    source: str | None = None,
) -> None:
    """Show what a config will read: counts by class, sizes, a picture of a training batch.

    Nothing is trained. Images that fit in memory are all decoded, so that a damaged one is found here. With --prompts,
    what a file or a set of prompts holds.

    Args:
        config: YAML of a job, of which the section data is read: its path, or the name of a packaged one.
        output: folder for batch.png, classes.csv and classes.json.
        pictures: images of the batch that are drawn.
        prompts: a file of prompts, or a set's name, such as geneval; list for all sets with their licences.
        source: folder or file that is read in place of the config's own source, as --data.source of mfm fit.

    Raises:
        CommandLineError: if neither or both of config and prompts are given, or a source without a config.
        FileNotFoundError: if there is no such config, or what it reads is not there.
        ValueError: if it has no data section, or one whose settings are unknown or do not fit; for prompts, as
            `read_prompts`.
    """
    if (config is None) == (prompts is None):
        raise CommandLineError("mfm data needs one of --config and --prompts")
    if source is not None and config is None:
        raise CommandLineError("--source stands in place of a config's own: give --config, too, such as pictures/mfm")
    if prompts is not None:
        from mfm_lightning.commands.prompt_tables import show_prompts, show_sets

        show_sets() if prompts == "list" else show_prompts(prompts)
    if config is None:
        return
    from mfm_lightning.commands.data_report import report
    from mfm_lightning.utils.atomic import check_is_folder

    check_is_folder(output)
    if pictures < 1:
        raise ValueError(f"--pictures {pictures} must be at least 1")
    report(config, output, pictures, source)
