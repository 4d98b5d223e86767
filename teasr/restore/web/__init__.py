"""The page of `teasr demo`: page.py is what a browser sees, files.py what happens to its files.

Files here may import what `teasr.restore` may; page.py alone imports gradio.
"""
