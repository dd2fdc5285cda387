#!/bin/bash
# Runs its arguments in a Slurm job and says how they ended.
"$@" 2>&1
echo "status $?"
