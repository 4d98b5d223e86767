"""Settings as they are written in YAML and as the program holds them: strict reading into frozen dataclasses, overrides, differences.

Imports nothing else of teasr, so that reading a configuration costs no heavy import.
"""
