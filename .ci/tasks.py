"""Everything the Makefile does, for machines with and without make: `python3 .ci/tasks.py TASK`.

Only the standard library, because it runs before anything is installed. The syntax is that of old Pythons, so that they
can say what is missing instead of failing with a SyntaxError.
"""
import argparse, hashlib, json, os, platform, shlex, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT/'.venv'
WINDOWS = os.name == 'nt'
BIN = VENV/('Scripts' if WINDOWS else 'bin')
PYTHON = BIN/('python.exe' if WINDOWS else 'python')
STAMP = VENV/'carnb-setup.json'
CHECKED = (3, 11), (3, 12)

TASKS = dict(
    setup='make or refresh .venv with the versions of constraints.txt',
    demo='draw a small competition, train, predict, ensemble, write a checked submission',
    test='everything that must hold before a commit; closes with "N passed, N failed"',
    test_all='test, and also the cells marked slow (and gpu where there is one)',
    docs='the documentation site from the notebooks, in _docs/',
    lab='JupyterLab: nbs/, with runs/ beside it (LAB_ARGS="--no-browser --port=9999" are its own options)',
    readme='README.md from nbs/index.ipynb',
    check='only the quick checks: export, cleanness, direction of imports, hygiene, README (no notebook is run)',
    torture='50 kills, damaged files, full disks, signals: in full, results into the notebooks of nbs/tests (an hour or more)',
    device_check='train, kill, resume and the memory study on this machine; a row in runs/devices.csv (DEVICE=cpu, cuda, mps)',
    notebooks='export, execute in place and clean all notebooks, or those of NB=04_losses',
)

def say(*words): print(*words, flush=True)

def die(message):
    sys.stderr.write('carnb: ' + message.strip() + '\n')
    sys.exit(2)


# Which Python

def find_python():
    "This Python when it will do, else a fitting one from PATH, else a message"
    if sys.version_info[:2] in CHECKED: return sys.executable
    names = ['python3.12', 'python3.11'] + (['python3.13'] if sys.version_info < (3, 11) else [])
    for name in names:
        path = shutil.which(name)
        if path and subprocess.call([path, '-c', 'import venv'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0: return path
    if sys.version_info >= (3, 11):
        say('Python %s: carnb is checked with 3.11 and 3.12; going on with what is here.' % platform.python_version())
        return sys.executable
    die('this is Python %s; carnb needs 3.11 or 3.12, and neither is on PATH.\n'
        'Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12) and run this again.'
        % platform.python_version())


# The environment

def wanted(torch):
    "What .venv must match: the files that define it, this folder (scripts hold its path) and the chosen torch"
    h = hashlib.sha256()
    for name in ('setup.py', 'settings.ini', 'constraints.txt', 'pyproject.toml', 'MANIFEST.in'):
        if (ROOT/name).exists(): h.update(name.encode() + (ROOT/name).read_bytes())
    return dict(files=h.hexdigest()[:16], root=str(ROOT), torch=torch)

def remembered():
    try: return json.loads(STAMP.read_text(encoding='utf8'))
    except (OSError, ValueError): return {}

def has_venv(): return PYTHON.exists() and subprocess.call([str(PYTHON), '-c', ''], stderr=subprocess.DEVNULL) == 0

def costs(torch):
    cpu = torch == 'cpu' or platform.system() != 'Linux'
    disk, download = (1.9, 0.7) if cpu else (5.6, 3.0)
    say('Setting up .venv: about %.1f GB of disk and %.1f GB of downloads (less when uv has them in its cache);' % (disk, download))
    say('usually 1 to 10 minutes, once.' + ('' if cpu else ' Without a GPU, TORCH=cpu takes a third (where an index with CPU wheels can be reached).'))
    free = shutil.disk_usage(str(ROOT)).free/1e9
    if free < disk + 1: say('Careful: only %.1f GB are free here.' % free)

def call(args, **kwargs):
    "The exit status of a command that is shown as it runs"
    say('$ ' + ' '.join(os.path.relpath(a, str(ROOT)) if str(a).startswith(str(ROOT) + os.sep) else str(a) for a in args))
    try: return subprocess.call([str(a) for a in args], cwd=str(ROOT), **kwargs)
    except OSError as e:
        say(str(e))
        return 127

def find_uv():
    for path in (shutil.which('uv'), str(BIN/('uv.exe' if WINDOWS else 'uv'))):
        try:
            if path and subprocess.call([path, '--version'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0: return path
        except OSError: pass

def make_venv(python):
    uv = find_uv()
    if uv and call([uv, 'venv', '--quiet', '--clear', '--seed', '--python', python, VENV]) == 0: return uv
    if subprocess.call([python, '-c', 'import ensurepip, venv'], stderr=subprocess.DEVNULL) != 0:
        die("this Python cannot make environments: its 'venv' or 'ensurepip' is missing.\n"
            'Debian, Ubuntu: apt install python3-venv. Or install uv, which needs neither.')
    if call([python, '-m', 'venv', '--clear', VENV]) != 0: die('python -m venv failed (the message is above)')
    if uv is None: call([PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', 'uv'])
    return find_uv()

def install(uv, torch):
    "The package, editable, with everything pinned; pip when uv cannot (it reads pip's own configuration)"
    what = ['-e', '.[dev]', '-c', 'constraints.txt']
    env = dict(os.environ, VIRTUAL_ENV=str(VENV)) # uv does not read what pip is told
    if 'PIP_INDEX_URL' in env and not {'UV_DEFAULT_INDEX', 'UV_INDEX_URL'} & set(env): env['UV_DEFAULT_INDEX'] = env['PIP_INDEX_URL']
    if 'PIP_CERT' in env: env.setdefault('SSL_CERT_FILE', env['PIP_CERT'])
    if uv:
        base = [uv, 'pip', 'install', '--python', PYTHON, '--reinstall-package', 'carnb', *what]
        if torch == 'cpu':
            if call(base + ['--torch-backend', 'cpu'], env=env) == 0: return
            say('CPU wheels of torch cannot be had from here: going on with the ordinary ones (larger, and they work without a GPU too).')
        if call(base, env=env) == 0: return
        say('uv could not install it; trying pip.')
    if subprocess.call([str(PYTHON), '-m', 'pip', '--version'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
        subprocess.call([str(PYTHON), '-m', 'ensurepip'], stdout=subprocess.DEVNULL)
    if call([PYTHON, '-m', 'pip', 'install', '--disable-pip-version-check', *what]) != 0:
        die('the installation failed (the message is above). Network, proxy or index? '
            'UV_DEFAULT_INDEX or PIP_INDEX_URL name a mirror; running the same command again goes on where it stopped.')

def setup():
    "Make .venv match the repository; takes no time when it does"
    old = remembered()
    torch = (os.environ.get('TORCH') or old.get('torch', '')).lower()
    if torch not in ('', 'cpu', 'auto'): die("TORCH=%s is unknown; 'cpu' takes the CPU wheels, nothing the ordinary ones" % torch)
    want = wanted(torch)
    fine = has_venv()
    if fine and old == want: return
    costs(torch)
    t = time.time()
    uv = find_uv()
    if not fine or old.get('root', str(ROOT)) != str(ROOT) or old.get('torch', torch) != torch:
        uv = make_venv(find_python())
    install(uv, torch)
    STAMP.write_text(json.dumps(want), encoding='utf8')
    say('.venv is ready after %.0f s.\n' % (time.time() - t))

def environ(**more):
    "The environment of a command inside .venv"
    env = dict(os.environ, VIRTUAL_ENV=str(VENV), PATH=str(BIN) + os.pathsep + os.environ.get('PATH', ''),
               JUPYTER_PREFER_ENV_PATH='1', PYTHONUTF8='1', NO_ALBUMENTATIONS_UPDATE='1', **more)
    env.pop('PYTHONHOME', None)
    return env

def inside(*args, **more):
    "Run a program of .venv in the repository's root; its exit status"
    try: return subprocess.call([str(BIN/args[0])] + [str(a) for a in args[1:]], cwd=str(ROOT), env=environ(**more))
    except FileNotFoundError: die('%s is not in .venv: remove .venv and run this again' % args[0])
    except KeyboardInterrupt: return 130


# The tasks

def notebooks(names=None, timeout=1800):
    "Export, execute in place, clean"
    names = names or [n[:-6] if n.endswith('.ipynb') else n for n in os.environ.get('NB', '').replace(',', ' ').split()]
    books = [p for p in sorted((ROOT/'nbs').glob('*.ipynb')) + sorted((ROOT/'nbs/tests').glob('*.ipynb'))
             if not names or p.stem in names or p.parent.name + '/' + p.stem in names]
    if not books: die('no notebook is called %s; they are in nbs/' % ' '.join(names))
    if inside('nbdev_export'): return 1
    failed = []
    for p in books:
        t = time.time()
        with tempfile.TemporaryDirectory() as d:
            rc = subprocess.call([str(BIN/'jupyter'), 'nbconvert', '--to', 'notebook', '--execute', '--log-level=ERROR', '--ExecutePreprocessor.timeout=%d' % timeout,
                                  '--ExecutePreprocessor.kernel_name=python3', '--output-dir', d, p.name], cwd=str(p.parent), env=environ(TQDM_DISABLE='1'))
            if rc == 0: shutil.copyfile(os.path.join(d, p.name), str(p))
        say('%s %s (%.0f s)' % ('executed' if rc == 0 else 'FAILED, left as it was:', p.relative_to(ROOT).as_posix(), time.time() - t))
        if rc == 0: rc = inside('nbdev_clean', '--fname', p)
        if rc: failed.append(p.name)
    if failed: say('failed: ' + ' '.join(failed))
    return int(bool(failed))

def lab():
    "JupyterLab with nbs/ open and runs/ beside it; LAB_ARGS are its own options"
    root = ['--allow-root'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else [] # in containers and on rented machines
    return inside('jupyter', 'lab', '--notebook-dir', ROOT, '--LabApp.default_url=/lab/tree/nbs', *root, *shlex.split(os.environ.get('LAB_ARGS', '')))

def run(task):
    if task == 'readme':
        import readme
        return readme.main([])
    setup()
    if task == 'setup': return 0
    if task == 'demo': return inside('carnb', 'demo')
    if task == 'docs': return inside('python', '.ci/docs.py')
    if task == 'lab': return lab()
    if task == 'notebooks': return notebooks()
    if task == 'torture': return notebooks(['tests/torture', 'tests/interruptions', 'tests/peers'], 7200)
    if task == 'device_check': return inside('python', '.ci/device_check.py')
    import checks
    return checks.main(task, BIN, environ)

def main():
    text = 'tasks:\n' + '\n'.join('  %-10s %s' % (k.replace('_', '-'), v) for k, v in TASKS.items())
    parser = argparse.ArgumentParser(prog='tasks.py', description='What can be done with this repository.', epilog=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=[t.replace('_', '-') for t in TASKS], metavar='TASK', help='one of those below')
    task = parser.parse_args().task.replace('-', '_')
    if sys.version_info < (3, 11):
        python = find_python()
        return subprocess.call([python, str(Path(__file__).resolve()), task.replace('_', '-')])
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True
    return run(task)

if __name__ == '__main__':
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit(130)
