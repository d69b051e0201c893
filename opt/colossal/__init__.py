"""What ColossalAI needs to train OPT: processes, a file a plugin, and below them a file a form of
the optimizer's state."""

# Before any import of ColossalAI.
from opt.colossal import light_import  # noqa: F401
