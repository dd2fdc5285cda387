# The end of a run, and what is sent elsewhere.


# Every file against the digests in the others, also those that no plan looks at any more.
rule verify:
    input:
        INPUTS.finished,
    output:
        "{run}/verify.json",
    log:
        "{run}/logs/verify.log",
    shell:
        "(earl prune --run {wildcards.run:q} && earl verify --run {wildcards.run:q} --out {output:q})"
        " 2>&1 | tee {log:q}"


rule report:
    input:
        INPUTS.finished,
        verify="{run}/verify.json",
    output:
        page=report("{run}/report.html", caption="../report/run.rst", category="{run}", labels={"shows": "report"}),
        curves=report(
            "{run}/report/curves.svg", caption="../report/curves.rst", category="{run}", labels={"shows": "curves"}
        ),
        evaluations=report(
            "{run}/report/evaluations.csv",
            caption="../report/evaluations.rst",
            category="{run}",
            labels={"shows": "evaluations"},
        ),
    log:
        "{run}/logs/report.log",
    shell:
        "earl report --run {wildcards.run:q} --out {output.page:q} --curves {output.curves:q}"
        " --evaluations {output.evaluations:q} 2>&1 | tee {log:q}"


# To Weights & Biases or the Hugging Face hub. No stage waits for it, and it takes no core from one. While a run goes on,
# a send that fails warns, and the next one makes up for it; the last one fails where something is missing.
rule send:
    input:
        INPUTS.send,
    output:
        "{run}/tracking/{place}-{step}.json",
    log:
        "{run}/logs/send/{place}-{step}.log",
    wildcard_constraints:
        place="wandb|hub",
    threads: 0
    params:
        command=lambda w: "track" if w.place == "wandb" else "push",
        effort=lambda w: "" if int(w.step) == PLANS[w.run].last else "--best-effort",
    shell:
        "earl {params.command} --run {wildcards.run:q} {params.effort} --out {output:q} < /dev/null 2>&1 | tee {log:q}"
