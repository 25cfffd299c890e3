"""``python -m benchmarks.step_through`` draws what was recorded; ``--record`` records anew, in a minute or two."""

import argparse
import json

from benchmarks.step_through import page, record

parser = argparse.ArgumentParser(prog="python -m benchmarks.step_through", description=__doc__.splitlines()[0])
parser.add_argument("--record", action="store_true", help="run the kernels on the emulator first")
if parser.parse_args().record:
    record.RESULT.write_text(record.text([record.case(*key) for key in record.cases()]), encoding="utf-8")
cases = json.loads(record.RESULT.read_text(encoding="utf-8"))
for path, written in page.pages(cases).items():
    path.write_text(written, encoding="utf-8")
