"""The command line, `lorafx merge`, `show`, `convert` and `diff`; torch is imported when one of them runs."""
