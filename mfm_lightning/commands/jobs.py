"""The commands of LightningCLI, and their help on one screen; all settings are LightningCLI's own (`--help_all`)."""

from __future__ import annotations

JOBS = {
    "fit": "train: a Meta Flow Map, a base flow, a value network, a policy, a classifier",
    "validate": "the losses on held-out data, and pictures, of a trained model",
    "test": "measure a trained model, and write tables and pictures",
    "predict": "draw samples, or align them with a reward by a method",
}
_CHECKPOINT = {
    "fit": "go on from this checkpoint, such as outputs/digits/mfm/last.ckpt",
    "predict": "the weights; the run's own last.ckpt if left out, where the job trains something",
}
_HELP = """Usage: mfm {name} --config CONFIG [options]

{about}.

  --config CONFIG              YAML of the job: its path, or the name of a packaged one, such as digits/mfm (mfm configs
                               lists them); of several, later ones win
  --KEY.KEY VALUE              any setting of the config, such as --trainer.max_steps 100 --data.init_args.batch_size 64
  --ckpt_path PATH             {checkpoint}
  --trainer.default_root_dir FOLDER   where the run writes
{more}  --imports MODULE             import a module of yours, so that its rewards have names; imports: in a config
  --print_config               the whole config, with all defaults, as YAML
  --debug                      the whole traceback of an error

  --help_all                   all settings of the trainer and of each run's callbacks (takes a few seconds)
  --model.help CLASS           the settings of a module, such as mfm_lightning.MFMPretraining
  --data.help CLASS            those of a data module, such as mfm_lightning.LatentShards"""


def short_help(name: str) -> str:
    """The help of a job on one screen."""
    about = JOBS[name][:1].upper() + JOBS[name][1:]
    checkpoint = _CHECKPOINT.get(name, "the weights; the run's own last.ckpt if left out")
    more = ""
    if name in ("fit", "predict"):
        more = "  --overwrite                  begin anew in the folder of a finished run\n"
    return _HELP.format(name=name, about=about, checkpoint=checkpoint, more=more)
