"""``python -m quadmix_plugin``: the command ``quadmix``."""

from quadmix_plugin.cli import main

if __name__ == "__main__":
    main()
