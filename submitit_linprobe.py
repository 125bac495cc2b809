#!/usr/bin/env python3
"""Do what `submitit_launch.py linprobe` does, under the name that MAE's command lines have."""

import sys

import submitit_launch

if __name__ == "__main__":
    submitit_launch.main(["linprobe", *sys.argv[1:]])
