"""Configuration: strict parsing of YAML into frozen dataclasses, command-line overrides and diffs.

This folder imports nothing else from teasr, so that reading a config requires no heavy imports.
"""
