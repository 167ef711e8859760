"""``python -m timm_dfs``, and with several processes ``torchrun --nproc-per-node N -m timm_dfs eval``."""

from .cli import main

if __name__ == "__main__":
    main()
