"""The report of a run: what an observer measured, the findings in words, the figures, one page.

    observer.py   looks at every block while it is reconstructed
    run.py        what is kept of a run, and its two small files
    findings.py   what the numbers say, in sentences
    figures.py    matplotlib's SVG in the page's own colours
    page.py       the page itself

The report is made from `report/run.json` and `report/measurements.safetensors` beside a result, so it can be written
again without the model.
"""
