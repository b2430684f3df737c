"""The command line, `lorafx merge`, `show`, `convert` and `diff`."""
