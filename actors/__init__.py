"""The actor runtime, the messages, and the actors themselves. Nothing below imports this folder."""
