"""What `make check`, `make test` and `make test-all` look at. Every check has a name, none stops the others."""
import ast, hashlib, json, os, re, shutil, signal, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
TOP = set('README.md Makefile MANIFEST.in settings.ini setup.py constraints.txt nbs carnb runs .github .ci LICENSE CONTRIBUTING.md CHANGELOG.md .gitignore'.split())
STAGES = 'check memory train grid predict ensemble submit report ablation speed'.split() # each has one notebook with a parameters cell
SLOW, MAX_MB, TIMEOUT, WORKERS = ('slow', 'gpu', 'notest'), 1.5, 900, 2


# Saying what happened

class Skip(Exception): pass
class Failed(Exception): pass

class Report:
    def __init__(self): self.passed, self.failed, self.skipped = [], [], []
    def add(self, name, seconds, problem=None, skip=None):
        took = f'{seconds:5.0f} s' if seconds >= .5 else '       '
        if skip: self.skipped.append(name)
        else: (self.failed if problem else self.passed).append(name)
        print(f'{"skip" if skip else "FAIL" if problem else "ok  "} {took}  {name}' + (f': {skip}' if skip else ''), flush=True)
        for line in (problem or '').rstrip().splitlines(): print('              | ' + line, flush=True)
    def check(self, name, f, *args):
        t, problem, skip = time.time(), None, None
        try: f(*args)
        except Skip as e: skip = str(e)
        except Failed as e: problem = str(e)
        except Exception as e: problem = f'{type(e).__name__}: {e}'
        self.add(name, time.time()-t, problem, skip)
    def close(self, seconds):
        print(f'\n{seconds/60:.1f} minutes' + (f'; failed: {", ".join(self.failed)}' if self.failed else ''))
        print(f'{len(self.passed)} passed, {len(self.failed)} failed' + (f', {len(self.skipped)} skipped' if self.skipped else ''), flush=True)
        return int(bool(self.failed))

def fail_on(problems, n=12):
    "Fail with the first `n` of a list of problems"
    problems = list(problems)
    if problems: raise Failed('\n'.join(problems[:n] + ([f'... and {len(problems)-n} more'] if len(problems) > n else [])))

def tail(text, n=14, width=300):
    "The last lines of a program's output, without colours, redrawn progress bars and the fences of a traceback"
    text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', text)
    lines = [l.split('\r')[-1].rstrip()[:width] for l in text.replace('\r\n', '\n').splitlines()]
    lines = [l for l in lines if l and not set(l) <= set('-=')]
    return '\n'.join(lines[-n:])

RUNNING = set()

def kill(p):
    "End a program and what it started"
    try: p.kill() if os.name == 'nt' else os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass

def command(args, env, cwd=ROOT, timeout=TIMEOUT, stdout=None):
    "Exit status and output of a program; it and its children end with the time limit"
    group = {} if os.name == 'nt' else dict(start_new_session=True)
    p = subprocess.Popen([str(a) for a in args], cwd=str(cwd), env=env, stdin=subprocess.DEVNULL, stdout=stdout or subprocess.PIPE,
                         stderr=subprocess.PIPE if stdout else subprocess.STDOUT, text=True, encoding='utf8', errors='replace', **group)
    RUNNING.add(p)
    try:
        out, err = p.communicate(timeout=timeout)
        return p.returncode, (out or '') + (err or '')
    except BaseException as e:
        kill(p)
        out, err = p.communicate()
        if isinstance(e, subprocess.TimeoutExpired): return 124, (out or '') + (err or '') + f'\nstopped after {timeout} s'
        raise
    finally: RUNNING.discard(p)


# Notebooks as data

def books(tests=True): return sorted(NBS.glob('[!_.]*.ipynb')) + (sorted((NBS/'tests').glob('[!_.]*.ipynb')) if tests else [])
def short(path): return path.relative_to(ROOT).as_posix()
def load(path): return json.loads(path.read_text(encoding='utf8'))
def source(cell): return ''.join(cell['source'])
def code_cells(path): return [(i, c) for i, c in enumerate(load(path)['cells']) if c['cell_type'] == 'code']
def tags(cell): return cell['metadata'].get('tags', [])

def directives(text):
    "Names after `#|` in the first lines of a cell"
    found = []
    for line in text.splitlines():
        if line.startswith('#|'): found.append(line[2:].strip())
        elif line.strip(): break
    return found

def number(name):
    "01a_demo -> (1, 'a'); None for a notebook without a number"
    m = re.match(r'(\d+)([a-z]?)_', name)
    return m and (int(m[1]), m[2])

def family(path):
    "What stands between the number and the first dot: 12a_ensemble.weights -> ensemble"
    return path.stem.split('_', 1)[1].split('.')[0]

def module_of(path):
    "The module that a notebook exports, without carnb: ensemble.weights, or ensemble for ensemble.__init__; its name when it exports none"
    exported = [d.split()[1] for _, c in code_cells(path) for d in directives(source(c)) if d.startswith('default_exp ')]
    return exported[0].removesuffix('.__init__') if exported else path.stem.split('_', 1)[1]

def python_only(text):
    "A cell's text without the lines that only IPython understands"
    return '\n'.join('pass' if l.lstrip()[:1] in '%!?' and l.strip() else l for l in text.splitlines())


# The checks that run no notebook

def files_and_hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
                                      for p in sorted(folder.rglob('*')) if p.is_file() and '__pycache__' not in p.parts}

def copy_project(d):
    "Sources in a temporary place, so that a check never changes the working tree"
    for name in ('settings.ini', 'setup.py', 'MANIFEST.in', 'pyproject.toml'):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, d)
    for p in books():
        to = Path(d)/p.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to)
    return Path(d)

def export_leaves_no_diff(bin, environ):
    "carnb/ is what the notebooks say, no more and no less"
    with tempfile.TemporaryDirectory() as d:
        d = copy_project(d)
        shutil.copytree(ROOT/'carnb', d/'carnb', ignore=shutil.ignore_patterns('__pycache__'))
        before = files_and_hashes(d/'carnb')
        for p in (d/'carnb').rglob('*.py'):
            if p.name == '_modidx.py' or 'AUTOGENERATED! DO NOT EDIT!' in p.read_text(encoding='utf8'): p.unlink()
        rc, out = command([bin/'nbdev_export'], environ(), cwd=d)
        if rc: raise Failed(tail(out))
        after = files_and_hashes(d/'carnb')
        fail_on([f'carnb/{p} ' + ('is not exported by any notebook' if p not in after else 'is missing' if p not in before else 'differs from its notebook')
                 + ': run nbdev_export' for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)])

def notebooks_are_clean(bin, environ):
    with tempfile.TemporaryDirectory() as d:
        d = copy_project(d)
        before = files_and_hashes(d/'nbs')
        rc, out = command([bin/'nbdev_clean', '--fname', 'nbs'], environ(), cwd=d)
        if rc: raise Failed(tail(out))
        after = files_and_hashes(d/'nbs')
        fail_on(f'nbs/{p} holds metadata or execution counts: run nbdev_clean' for p in before if after[p] != before[p])

def no_error_outputs():
    fail_on(f'{short(p)} cell {i}: {o.get("ename")}: {str(o.get("evalue"))[:120]}'
            for p in books() for i, c in code_cells(p) for o in c['outputs'] if o['output_type'] == 'error')

def notebooks_are_executed():
    "A notebook that prints or plots has outputs"
    for_outputs = re.compile(r'\b(?:print|display|plt\.|show_batch|\.plot|imshow)')
    fail_on(f'{short(p)} holds no outputs: run make notebooks NB={p.stem}' for p in books(tests=False)
            if any(for_outputs.search(source(c)) and not directives(source(c)) for _, c in code_cells(p)) and not any(c['outputs'] for _, c in code_cells(p)))

def imports_of(tree, package=''):
    "Dotted names below carnb that a syntax tree of a module in `package` imports, with their line: ensemble.weights.soften"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): found = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            parts = ['carnb', *filter(None, package.split('.'))]
            base = ['.'.join(parts[:len(parts)-n.level+1])] if n.level else []
            base = '.'.join([*base, *filter(None, [n.module])])
            found = [f'{base}.{a.name}' for a in n.names]
        else: continue
        for name in found:
            if name.startswith('carnb.'): yield name.removeprefix('carnb.'), n.lineno

def room_of(name, rooms):
    "The module that an imported dotted name lives in: the longest known one; None for what is no module of ours"
    parts = name.split('.')
    return next((m for i in range(len(parts), 0, -1) if (m := '.'.join(parts[:i])) in rooms), None)

def trees_of(path):
    "The cells of a notebook as syntax trees, each with its place"
    for i, c in code_cells(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                yield f'{short(path)} cell {i}', ast.parse(python_only(source(c)))
        except SyntaxError:
            if not source(c).startswith('%%'): raise Failed(f'{short(path)} cell {i} is not Python')

def modules():
    "(path, dotted name, package) of every module in carnb/ that a notebook exports"
    for p in sorted((ROOT/'carnb').rglob('*.py')):
        parts = p.relative_to(ROOT/'carnb').with_suffix('').parts
        package = '.'.join(parts[:-1])
        if parts[-1] == '__init__':
            if package: yield p, package, package
        elif not parts[-1].startswith('_'): yield p, '.'.join(parts), package

def imports_point_down():
    "A notebook imports only from lower-numbered ones (and, in its examples, from its own module); modules are known by their `default_exp`"
    numbered = [p for p in books(tests=False) if number(p.stem)]
    names = {p: module_of(p) for p in numbered}
    rooms = {names[p]: number(p.stem) for p in numbered}
    todo = [(names[p], '', where, tree, True) for p in numbered for where, tree in trees_of(p)]
    todo += [(name, package, short(p), ast.parse(p.read_text(encoding='utf8')), False) for p, name, package in modules()]
    problems = []
    for me, package, where, tree, own in todo:
        if me not in rooms: continue
        for name, line in imports_of(tree, package):
            m = room_of(name, rooms)
            if m is None or m == me and own: continue
            if m == me: problems.append(f'{where}, line {line}: {me} imports from itself')
            elif rooms[m] >= rooms[me]: problems.append(f'{where}, line {line}: {me} imports {m}, which does not come before it')
    fail_on(sorted(set(problems), key=problems.index))

def tracked():
    "Files that are or would be committed"
    try:
        out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=str(ROOT), capture_output=True, check=True).stdout.decode('utf8')
        return sorted(p for p in (ROOT/n for n in set(out.split('\0')) if n) if p.is_file())
    except (OSError, subprocess.CalledProcessError): raise Skip('not a git repository')

def texts(path):
    "(where, text) of a file; in a notebook, of every cell's source and text outputs"
    if path.suffix == '.ipynb':
        for i, c in enumerate(load(path)['cells']):
            yield f'{short(path)} cell {i}', source(c)
            for o in c.get('outputs', []):
                shown = [o.get('text', ''), *o.get('traceback', [])] + [v for k, v in o.get('data', {}).items() if not k.startswith('image/') or 'svg' in k]
                for v in shown: yield f'{short(path)} cell {i}, output', ''.join(v) if isinstance(v, list) else str(v)
    else:
        try: yield short(path), path.read_text(encoding='utf8')
        except UnicodeDecodeError: pass

def search(pattern, but=()):
    for p in tracked():
        if p.name in but: continue
        for where, text in texts(p):
            for m in re.finditer(pattern, text): yield f'{where}: {text[max(0, m.start()-20):m.end()+30]!r}'

def no_machine_paths():
    here = [re.escape(str(p)) for p in (ROOT, Path.home()) if len(p.parts) > 2]
    pattern = '|'.join([r'(?<![\w.~:/*\]})-])/(?:home|root|work|Users)/\w', r'(?<!\w)[A-Z]:\\\\?(?:Users|home|work)\b', *here])
    fail_on(search(pattern))

def no_index_hosts():
    hosts = r'\b(?:test\.)?pypi\.(?:org|io)\b|pythonhosted\.(?:org|com)|download\.pytorch|anaconda\.(?:org|com)|npmjs\.(?:org|com)'
    fail_on(search(hosts + r'|--(?:extra-)?index-url[ =]\S|(?i:\bindex[-_]url\s*=\s*\S)', but={'LICENSE'}))

def no_large_files():
    fail_on(f'{short(p)} has {p.stat().st_size/1e6:.2f} MB, allowed are {MAX_MB}' for p in tracked() if p.stat().st_size > MAX_MB*1e6)

def top_level():
    found = {p.relative_to(ROOT).parts[0] for p in tracked()}
    why = {'pyproject.toml': ' (nbdev_export writes it unless settings.ini says update_pyproject = False)'}
    fail_on([f'{n} does not belong on the top level' + why.get(n, '') for n in sorted(found - TOP)]
            + [f'{n} is missing' for n in sorted(TOP - found)])

def parameters_cells():
    "Without the tag, papermill ignores -p in silence; and papermill runs every cell, so no stage may export the package"
    problems, stages = [], {}
    for p in books(tests=False):
        n = sum('parameters' in tags(c) for _, c in code_cells(p))
        if n > 1: problems.append(f'{short(p)} has {n} cells tagged parameters, expected 1')
        if not n: continue
        kind = '.text' if p.stem.endswith('.text') else '' # the same stage for another kind of problem
        stages.setdefault(family(p) + kind, []).append(short(p))
        problems += [f'{short(p)} cell {i} calls nbdev_export, which would rewrite carnb/ in every run' for i, c in code_cells(p) if 'nbdev_export(' in source(c)]
    problems += [f'no notebook of the stage {s} has a cell tagged parameters' for s in STAGES if s not in stages]
    problems += [f'{" and ".join(found)} both have a parameters cell: the stage {s} has one notebook' for s, found in stages.items() if len(found) > 1]
    fail_on(problems)

def readme_in_sync():
    import readme
    if not readme.SOURCE.exists(): raise Skip(f'{short(readme.SOURCE)} is not there')
    if not readme.TARGET.exists() or readme.TARGET.read_text(encoding='utf8') != readme.convert(): raise Failed('README.md is not what nbs/index.ipynb says: run make readme')

def static_checks(report, bin, environ):
    report.check('nbdev_export leaves no diff', export_leaves_no_diff, bin, environ)
    report.check('notebooks are clean', notebooks_are_clean, bin, environ)
    report.check('no output is an error', no_error_outputs)
    report.check('notebooks are executed', notebooks_are_executed)
    report.check('notebooks import downwards only', imports_point_down)
    report.check('stage notebooks have one parameters cell and export nothing', parameters_cells)
    report.check('no path of a machine', no_machine_paths)
    report.check('no address of a package index', no_index_hosts)
    report.check(f'no file above {MAX_MB} MB', no_large_files)
    report.check('top level', top_level)
    report.check('README.md is nbs/index.ipynb', readme_in_sync)


# The checks that run notebooks

def books_by_command(bin, env, slow):
    "(path, seconds, problem) of each notebook by nbdev_test, where processes cannot be forked"
    def one(p):
        t = time.time()
        args = [bin/'nbdev_test', '--path', p, '--n_workers', '0'] + (['--flags', slow] if slow else [])
        rc, out = command(args, env, timeout=TIMEOUT*(4 if slow else 1))
        return p, time.time()-t, None if rc == 0 else tail(out, 20)
    with ThreadPoolExecutor(WORKERS) as pool:
        try: yield from pool.map(one, books())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for p in list(RUNNING): kill(p)
            raise

def books_by_fork(bin, env, slow):
    "The same by .ci/books.py, which loads the libraries once"
    args = [bin/'python', ROOT/'.ci/books.py', WORKERS, TIMEOUT*(4 if slow else 1), slow, *books()]
    p = subprocess.Popen([str(a) for a in args], cwd=str(ROOT), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding='utf8')
    try:
        for o in map(json.loads, p.stdout): yield Path(o['path']), o['seconds'], None if o['passed'] else tail(o['said'], 20) or 'ended without a word'
    finally:
        p.terminate()
        p.wait()

def run_books(report, bin, env, slow):
    "nbdev's test of each notebook in a process of its own, two at a time"
    tested = books_by_fork if sys.platform == 'linux' else books_by_command
    left = set(books())
    for p, seconds, problem in tested(bin, env, slow):
        report.add(short(p), seconds, problem)
        left.discard(p)
    for p in sorted(left): report.add(short(p), 0, 'was not run')
    left = {}
    for p in books():
        for _, c in code_cells(p):
            for d in directives(source(c)):
                flag = d.split()[0] if d else ''
                if flag in SLOW and flag not in slow.split(): left.setdefault((short(p), flag), []).append(c)
    for (name, flag), cells in left.items(): report.add(f'{name}, cells marked {flag}', 0, skip=f'{len(cells)} not run' + ('' if flag == 'notest' else ' (make test-all)' if not slow else ''))
    if shutil.which('chromium') is None: report.add('a bar in JupyterLab', 0, skip='no chromium on PATH')
    if not has_ray(bin, env): report.add('a Ray of two nodes (nbs/tests/ray.ipynb)', 0, skip="Ray is not installed: pip install 'carnb[cluster]'")
    if not os.environ.get('CARNB_CLEVAL'): report.add('CLEval beside its package', 0, skip='CARNB_CLEVAL names no Python that has cleval')
    if not (ROOT.parent/'shared'/'data').is_dir(): report.add('real photos', 0, skip='no photos in ../shared/data; the drawn competition stood in for them')

def run_process_tests(report, bin, env, slow):
    "The functions `test_*` of process_tests.py, each in a process of its own; those that are called `_alone` first, then the others side by side"
    path = Path(__file__).with_name('process_tests.py')
    found = [n for n in ast.parse(path.read_text(encoding='utf8')).body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')]
    def one(f):
        if f.name.endswith('_long') and not slow: return report.add(ast.get_docstring(f), 0, skip='long (make test-all)')
        t = time.time()
        rc, out = command([bin/'python', path, f.name], env)
        report.add(ast.get_docstring(f), time.time()-t, problem=None if rc in (0, 77) else tail(out, 20), skip=tail(out, 1) if rc == 77 else None)
    def named(*ends): return [f for f in found if f.name.endswith(ends)]
    for f in named('_alone'): one(f)
    with ThreadPoolExecutor(WORKERS) as pool: list(pool.map(one, [f for f in found if f not in named('_alone', '_long')]))
    for f in named('_long'): one(f)

def has_ray(bin, env): return command([bin/'python', '-c', 'import sys, importlib.util as u; sys.exit(u.find_spec("ray") is None)'], env)[0] == 0

def has_gpu(bin, env): return command([bin/'python', '-c', 'import sys, torch; sys.exit(not torch.cuda.is_available())'], env)[0] == 0

def main(task, bin, environ):
    t, report = time.time(), Report()
    def stop(*_): raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    static_checks(report, bin, environ)
    if task != 'check':
        with tempfile.TemporaryDirectory(prefix='carnb-test-') as d:
            env = environ(CARNB_RUNS=str(Path(d)/'runs'), OMP_NUM_THREADS='1', MPLBACKEND='agg', TQDM_DISABLE='1')
            slow = '' if task == 'test' else 'slow gpu' if has_gpu(bin, env) else 'slow'
            run_books(report, bin, env, slow)
            run_process_tests(report, bin, {**env, 'OMP_NUM_THREADS': str(os.cpu_count() or 1)}, slow)
    return report.close(time.time()-t)
