"""The subcommands of ``fewstep``, one click object a file, of the file's name."""
