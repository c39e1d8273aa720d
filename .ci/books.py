"""Tests notebooks, each in a process of its own, forked from one that has loaded the libraries: they are loaded once, not a hundred times.
usage: books.py WORKERS SECONDS FLAGS NOTEBOOK...    prints a line of JSON per notebook: path, seconds, whether it passed, the end of its output"""
import json, os, signal, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # before torch, as carnb.core does
os.environ['IN_TEST'] = '1'

def load_libraries():
    "What most notebooks import; nothing of carnb, which is what is tested"
    import warnings
    warnings.simplefilter('ignore')
    import albumentations, cv2, fastai.vision.all, pandas, scipy.stats, sklearn.metrics, timm, torch
    import nbdev.test

def test(path, flags, out):
    "In the child: run the notebook, its output into a file"
    fd = os.open(out, os.O_WRONLY | os.O_CREAT)
    for to in (1, 2): os.dup2(fd, to)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config()
    os.chdir(config.nbs_path)
    passed, _ = test_nb(Path(path), skip_flags=config.tst_flags.split(), force_flags=flags.split(), basepath=config.config_path)
    for s in (sys.stdout, sys.stderr): s.flush()
    return passed

def end(pid):
    "End a notebook and what it started"
    import psutil
    try: family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error: return
    for p in family:
        try: p.kill()
        except psutil.Error: pass

def main(workers, limit, flags, *paths):
    load_libraries()
    todo, running = [os.path.abspath(p) for p in paths], {}
    def stop(*_):
        for pid in running: end(pid)
        os._exit(130)
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, stop)
    with tempfile.TemporaryDirectory() as d:
        while todo or running:
            while todo and len(running) < int(workers):
                path, out = todo.pop(0), os.path.join(d, str(len(todo)))
                if pid := os.fork(): running[pid] = (path, out, time.time())
                else:
                    try: passed = test(path, flags, out)
                    except BaseException as e: passed = print(f'{type(e).__name__}: {e}', flush=True)
                    os._exit(not passed)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                for p, (path, out, t) in running.items():
                    if time.time()-t > float(limit): end(p)
                time.sleep(.05)
                continue
            path, out, t = running.pop(pid)
            said = Path(out).read_text(encoding='utf8', errors='replace') if os.path.exists(out) else ''
            if time.time()-t > float(limit): said += f'\nstopped after {limit} s'
            print(json.dumps(dict(path=path, seconds=time.time()-t, passed=status == 0, said=said[-20000:])), flush=True)

if __name__ == '__main__': main(*sys.argv[1:])
