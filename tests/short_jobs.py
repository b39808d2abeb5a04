"""Jobs of `mfm fit` for tests that need their files, however good."""

FOUR_STEPS = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"]
