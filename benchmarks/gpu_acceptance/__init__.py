"""What a GPU has to show: thirteen stages, nine minutes, from a bare machine without a network.

    make gpu-kit DATA=CIFAR100_FOLDER OFFICIAL=CLONE      # here: .gpu/ with what the machine lacks, below 52
    MB .gpu/run.sh OUT                                       # there, in a copy of the project python -m
    benchmarks.gpu_acceptance.page OUT          # here: docs/performance/gpu.json, and the page made of it

A stage is a process of its own with a limit; it prints one line of JSON and never stops the next one. It also
runs to its end on a machine without a GPU, where the stages that need one say so.
"""
