"""Makes a token store from text: hybrid_attn/commands/prepare_data.py, which pip installs as hybrid-prepare-data."""

from hybrid_attn.commands import prepare_data

if __name__ == "__main__":
    prepare_data.start()
