"""`python -m mfm_lightning` is the command `mfm`; under torchrun it is what each process runs."""

from mfm_lightning.commands.main import main

if __name__ == "__main__":
    main()
