"""Chats with the model of a checkpoint: hybrid_attn/commands/chat.py, which pip installs as hybrid-chat."""

from hybrid_attn.commands import chat

if __name__ == "__main__":
    chat.start()
