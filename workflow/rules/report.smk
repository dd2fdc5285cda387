# The end of a run: every file is checked against the digests in the others, also those that no plan looks at any more.


rule verify:
    input:
        lambda w: files.finished(plan(w)),
    output:
        "{run}/verify.json",
    log:
        "{run}/logs/verify.log",
    shell:
        "(earl prune --run {wildcards.run:q} && earl verify --run {wildcards.run:q} --out {output:q})"
        " 2>&1 | tee {log:q}"


rule report:
    input:
        lambda w: files.finished(plan(w)),
        verify="{run}/verify.json",
    output:
        page=report(
            "{run}/report.html",
            caption="../report/run.rst",
            category="{run}",
            labels={"shows": "report"},
        ),
        curves=report(
            "{run}/report/curves.svg",
            caption="../report/curves.rst",
            category="{run}",
            labels={"shows": "curves"},
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
