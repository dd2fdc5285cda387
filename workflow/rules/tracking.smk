# Shows runs elsewhere, from a machine that reaches the internet: Weights & Biases, the Hugging Face hub.
#
# No stage waits for these, and they take no core from one. While a run goes on, a send that fails warns, and the next
# one makes up for it. The last one, after the report, fails where something is missing; start the workflow again then.


rule track:
    input:
        sent_after,
    output:
        "{run}/tracking/wandb-{step}.json",
    log:
        "{run}/logs/track/{step}.log",
    threads: 0
    params:
        best_effort=best_effort,
    shell:
        "earl track --run {wildcards.run:q} {params.best_effort} --out {output:q} < /dev/null 2>&1 | tee {log:q}"


rule push:
    input:
        sent_after,
    output:
        "{run}/tracking/hub-{step}.json",
    log:
        "{run}/logs/push/{step}.log",
    threads: 0
    params:
        best_effort=best_effort,
    shell:
        "earl push --run {wildcards.run:q} {params.best_effort} --out {output:q} < /dev/null 2>&1 | tee {log:q}"
