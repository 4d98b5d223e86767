import logging

# peft imports bitsandbytes where it is installed, which on a machine without GPU warns of a kernel that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
