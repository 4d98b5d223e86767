"""The verbs of the command `teasr`, one file each: `parser(prog)` and `main(arguments, prog)`.

May import everything else in teasr, and nothing else imports it. Each file imports only the standard library at its
top, so that every `--help` and the shell completion answer at once; what a verb needs is imported when it runs.
"""
