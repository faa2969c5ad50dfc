"""The papers' command line over lrquant's own functions: `python main.py --model MODEL --wbits 4 --abits 4 --lwc`.

Everything it does, `lrquant quantize` does too, with more to choose from.
"""

from lrquant.cli.published import quantize, run_published

if __name__ == "__main__":
    run_published(quantize)
