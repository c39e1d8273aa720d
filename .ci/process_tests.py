"""What only whole processes can show: papermill and the command line as a user types them.

`python .ci/process_tests.py NAME` runs one; `make test` runs all, with CARNB_RUNS in a temporary folder that they share: first those
that train, called `_alone`, one after the other, then the rest side by side. Exit status 77 means skipped. The docstring is the name in
the report; `_long` belongs to `make test-all`.
"""
import contextlib, csv, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RUNS = Path(os.environ.get('CARNB_RUNS') or tempfile.mkdtemp())
RUNS.mkdir(parents=True, exist_ok=True)
NOTEBOOK = 'nbs/10_train.ipynb'
FILES = 'config.yaml history.csv metrics.json oof.npz train.ipynb weights.safetensors'.split()
CHANGED = dict(arch='convnext_large', pretrained='false', img_size=96, epochs=1, max_steps=2, num_workers=0)
SCREEN, COLUMNS = dict(overview=30, stage=130), 80

def params(**values): return [x for k, v in values.items() for x in ('-p', k, str(v))]

def program(*args, stdout=subprocess.PIPE, cwd=ROOT):
    "Exit status and everything that a program of .venv says; the environment is a user's, not a test's"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    p = subprocess.run([str(BIN/args[0]), *map(str, args[1:])], cwd=str(cwd), env={**env, 'CARNB_RUNS': str(RUNS)}, stdin=subprocess.DEVNULL, stdout=stdout,
                       stderr=subprocess.STDOUT if stdout == subprocess.PIPE else subprocess.PIPE, text=True, encoding='utf8', errors='replace')
    return p.returncode, (p.stdout or '') + (p.stderr or '')

def papermill(*args, **kwargs): return program('papermill', NOTEBOOK, *args, **kwargs)

def need(found, what, said=''):
    if not found: raise AssertionError(what + (f'; it said:\n{said[-2500:]}' if said else ''))

def the_run(experiment):
    "The one run folder of an experiment"
    found = sorted(p.parent for p in (RUNS/experiment).glob('*/fold*/config.yaml'))
    need(len(found) == 1, f'{experiment} has {len(found)} run folders, expected one')
    return found[0]

def history(run):
    with open(run/'history.csv', newline='', encoding='utf8') as f: return list(csv.DictReader(f))

def stamps(run): return {n: (run/n).stat().st_mtime_ns for n in FILES if n != 'train.ipynb'}

def effect(run):
    "The overridden parameters did something: they are recorded, and the results have their mark"
    import numpy as np, yaml
    from safetensors import safe_open
    need(not (missing := [n for n in FILES if not (run/n).exists()]), f'{run.name} lacks {missing}')
    config = yaml.safe_load((run/'config.yaml').read_text(encoding='utf8'))
    for k, v in dict(arch='convnext_large', img_size=96, epochs=1, max_steps=2, pretrained=False).items():
        need(config.get(k) == v, f'config.yaml says {k}: {config.get(k)!r}, the command said {v!r}')
    need(run.parent.name.startswith('convnext_large-96-'), f'the folder is called {run.parent.name}')
    rows = history(run)
    need(len(rows) == 1, f'history.csv has {len(rows)} rows, expected 1')
    with safe_open(run/'weights.safetensors', 'np') as f: largest = max(np.prod(f.get_slice(k).get_shape()) for k in f.keys())
    need(largest >= 4*1536**2, f'the largest weight has {largest} numbers: this is not a convnext_large')
    oof = np.load(run/'oof.npz')
    need(len(oof['ids']) == len(oof['targets']) == len(oof['logits']) > 0, 'oof.npz is not aligned')
    need(oof['logits'].shape[1] == len(oof['classes']) and np.isfinite(oof['logits']).all(), 'oof.npz has wrong logits')
    need(json.loads((run/'metrics.json').read_text(encoding='utf8')), 'metrics.json is empty')
    cells = json.loads((run/'train.ipynb').read_text(encoding='utf8'))['cells']
    need(any('convnext_large' in ''.join(c['source']) for c in cells), 'train.ipynb does not hold the injected parameters')

def test_papermill_with_output_alone():
    "papermill with an output path trains what -p asks for"
    out = RUNS/'my_run.ipynb'
    rc, said = papermill(out, *params(experiment='with_output', **CHANGED))
    need(rc == 0, f'exit status {rc}', said)
    need(out.exists(), 'papermill wrote no notebook')
    effect(the_run('with_output'))

def test_papermill_to_file_alone():
    "papermill with its output in a file records the same run"
    with open(RUNS/'stdout.txt', 'w', encoding='utf8') as f: rc, said = papermill(*params(experiment='to_file', **CHANGED), stdout=f)
    need(rc == 0, f'exit status {rc}', said)
    a, b = the_run('with_output'), the_run('to_file')
    effect(b)
    need(a.relative_to(RUNS/'with_output') == b.relative_to(RUNS/'to_file'), f'the folders differ: {a} and {b}')
    need(sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()), 'the folders hold different files')
    for k in ('train_loss', 'val_loss'): need(history(a)[0][k] == history(b)[0][k], f'{k} differs: {history(a)[0][k]} and {history(b)[0][k]}')

def test_papermill_terminal():
    "papermill knows every parameter of a stage and says nothing of unknown ones"
    rc, said = papermill(RUNS/'known.ipynb', '--prepare-only', *params(epochs=1, tracking='x', data_dir='x', experiment='known'))
    need(rc == 0 and 'unknown' not in said and 'Unable to parse' not in said, f'exit status {rc}', said)

def test_papermill_again():
    "the same command finds its run done"
    run = the_run('with_output')
    before, t = stamps(run), time.time()
    rc, said = papermill(RUNS/'again.ipynb', *params(experiment='with_output', **CHANGED))
    need(rc == 0, f'exit status {rc}', said)
    need(stamps(the_run('with_output')) == before, 'something was computed again')

def test_papermill_misspelt():
    "papermill refuses a misspelt parameter"
    rc, said = papermill(RUNS/'wrong.ipynb', *params(experiment='wrong', epoch=1, **CHANGED))
    need(rc != 0, 'exit status 0', said)
    need('did you mean epochs' in said, 'no "did you mean epochs"', said)
    need(not list((RUNS/'wrong').glob('*/fold*')), 'it left a run folder')

def refused(stage, expected, **values):
    "A command that must fail with one short message"
    rc, said = program('carnb', stage, *params(**values))
    need(rc not in (0, None), 'exit status 0', said)
    for word in expected: need(word in said, f'no {word!r} in the message', said)
    need('Traceback' not in said and len(said.splitlines()) <= 30, f'{len(said.splitlines())} lines, or a traceback', said)

def test_cli_help():
    "carnb --help fits on a screen, carnb train --help in 80 columns"
    for args, lines, words in ((['--help'], SCREEN['overview'], ['train', 'predict', 'demo']), (['train', '--help'], SCREEN['stage'], ['arch', 'fold', 'epochs', 'img_size'])):
        rc, said = program('carnb', *args)
        need(rc == 0, f'exit status {rc}', said)
        for w in words: need(w in said, f'no {w!r}', said)
        need(len(said.splitlines()) <= lines, f'{len(said.splitlines())} lines', said)
        need(max(map(len, said.splitlines())) <= COLUMNS, f'{max(map(len, said.splitlines()))} columns', said)

def test_cli_unknown_arch():
    "carnb train refuses an unknown arch"
    refused('train', ['convnext_lage', 'did you mean'], experiment='wrong', arch='convnext_lage', pretrained='false')

def test_cli_misspelt():
    "carnb train refuses a misspelt parameter"
    refused('train', ['did you mean epochs'], experiment='wrong', epoch=1)

def test_cli_bad_values():
    "carnb train names all bad values at once"
    refused('train', ['fold', 'epochs', 'task'], experiment='wrong', fold=7, epochs=0, task='cras')

def test_cli_no_stage():
    "carnb refuses an unknown stage"
    rc, said = program('carnb', 'trian')
    need(rc != 0 and 'train' in said and 'Traceback' not in said, f'exit status {rc}', said)

def test_cli_bad_folders():
    "carnb train refuses missing, empty and one-class folders"
    with tempfile.TemporaryDirectory() as d:
        refused('train', ['nowhere'], experiment='wrong', data_dir=Path(d)/'nowhere')
        (Path(d)/'empty').mkdir()
        refused('train', ['empty'], experiment='wrong', data_dir=Path(d)/'empty')
        import numpy as np
        from PIL import Image
        one = Path(d)/'one'/'train'/'only'
        one.mkdir(parents=True)
        for i in range(8): Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype='uint8')).save(one/f'{i}.jpg')
        refused('train', ['class'], experiment='wrong', data_dir=Path(d)/'one')
    need(not list((RUNS/'wrong').glob('*/fold*')), 'a refused command left a run folder')

def test_demo_long():
    "carnb demo, and again with nothing to do"
    rc, said = program('carnb', 'demo')
    need(rc == 0, f'exit status {rc}', said)
    submission = RUNS/'demo'/'ensemble'/'submission.csv'
    need(submission.exists(), 'no submission.csv', said)
    said_of = lambda words: next((l for l in said.splitlines() if words in l), '')
    right = re.search(r'(\d+)% right', said_of('the best model alone'))
    need(right and int(right[1]) >= 75, f'a single model is right on: {said_of("the best model alone")!r}')
    for words,verdict in (('  and mirrored', 'better'), ('  and upside down', 'worse'), ('  the ensemble (', 'better')):
        need(said_of(words).endswith(f'{verdict})'), f'expected {verdict}: {said_of(words)!r}')
    left = sum(p.stat().st_size for p in RUNS.glob('demo/**/*') if p.is_file())
    need(left < 50e6, f'{left/1e6:.0f} MB are left in runs/demo')
    before = submission.read_bytes()
    rc, said = program('carnb', 'demo')
    need(rc == 0 and '8 of 8 cells done' in said and 'cell 1 of' not in said, f'exit status {rc}, or something was trained again', said)
    need(said.count(': done before') == 8 and submission.read_bytes() == before, 'something was predicted again, or the file is another', said)

def launcher(name, **more):
    "carnb grid on four tiny cells as a process"
    settings = dict(img_size=32, batch_size=16, epochs=4, max_steps=16, pretrained=False, num_workers=0, checkpoint_minutes=0)
    words = ['grid', *params(experiment=name, archs='test_resnet', folds='0,1', seeds='1,2', device='cpu', workers=2, settings=json.dumps(settings), **more)]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(CARNB_RUNS=str(RUNS), OMP_NUM_THREADS='1')
    return subprocess.Popen([str(BIN/'carnb'), *map(str, words)], cwd=str(ROOT), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, encoding='utf8', errors='replace', start_new_session=True)

def cells_of(name):
    "Processes that train a cell of a grid"
    import psutil
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = p.cmdline()
            if 'carnb.cli' in words and 'train' in words and name in words: found.append(p)
    return found

def grid_results(name):
    "Weights and logits of each cell"
    import numpy as np
    done = sorted(p.parent for p in (RUNS/name).glob('*/fold*/metrics.json'))
    return {str(p.relative_to(RUNS/name)): ((p/'weights.safetensors').read_bytes(), np.load(p/'oof.npz')['logits'].tobytes()) for p in done}

def test_grid_long():
    "carnb grid, launcher and cells killed at three random moments each: the same bits, nothing trained twice"
    import random
    said = (p := launcher('grid_whole')).communicate()[0]
    need(p.returncode == 0 and '4 of 4 cells done' in said, f'exit status {p.returncode}', said)
    moments = [random.uniform(8, 40) for _ in range(6)]
    print('seconds:', *[f'{t:.1f}' for t in moments])
    for i, t in enumerate(moments):
        p = launcher('grid_killed')
        with contextlib.suppress(subprocess.TimeoutExpired): p.wait(t)
        if i < 3: p.kill()
        elif cells := cells_of('grid_killed'): cells[0].kill()
        said = p.communicate()[0]
        need(i < 3 or p.returncode == 0, f'exit status {p.returncode}', said)
        end = time.time()+60
        while cells_of('grid_killed') and time.time() < end: time.sleep(.2)
        need(not cells_of('grid_killed'), 'cells live on a minute after their launcher')
    whole, killed = grid_results('grid_whole'), grid_results('grid_killed')
    need(len(killed) == 4 and whole == killed, 'the results differ from those of an unbroken grid')

if __name__ == '__main__':
    try: globals()[sys.argv[1]]()
    except AssertionError as e: sys.exit(str(e))
