# Where a run starts from.


# Where the configuration requires something of the judge, no run starts without it. One that has started goes on.
rule judge_gate:
    output:
        "{run}/judge_check.json",
    log:
        "{run}/logs/judge_gate.log",
    benchmark:
        "{run}/benchmarks/judge_gate.tsv"
    threads: lambda w: settings_of(w).cpu_threads
    resources:
        gpu=lambda w: need.judging_gpus(settings_of(w)),
    shell:
        "earl judge check --config {wildcards.run:q}/config.json --out {output:q} 2>&1 | tee {log:q}"


rule start:
    input:
        policy=lambda w: SHARED.file_of(SHARED.starting_policy(settings_of(w))),
        gate=lambda w: ancient(files.judge_check(plan(w))),
    output:
        "{run}/iterations/000000/start.json",
    log:
        "{run}/logs/start.log",
    params:
        policy=lambda w: SHARED.starting_policy(settings_of(w)),
    shell:
        "earl start --run {wildcards.run:q} --policy {params.policy:q} 2>&1 | tee {log:q}"
