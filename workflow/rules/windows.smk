# The outer plan of a long run: a chain of windows. Each is planned and run by a Snakemake of its own, which ends with
# it; so neither memory nor the time to plan grows with the number of iterations.


rule window:
    input:
        before_window,
    output:
        policy="{run}/iterations/{step}/policy/manifest.json",
        trainer="{run}/iterations/{step}/trainer/manifest.json",
        metrics="{run}/iterations/{step}/train/metrics.json",
    log:
        "{run}/logs/window/{step}.log",
    wildcard_constraints:
        run=WINDOW_ENDS,
    threads: lambda w: 1 if SEGMENTS else window_cores()
    params:
        launch=window_launcher,
        snakemake=window_command,
    shell:
        "{params.launch}{params.snakemake} 2>&1 | tee {log}"
