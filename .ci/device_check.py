"""Does this machine do what carnb promises? Train, kill, resume, and the memory study, in minutes.

`make device-check` writes a row with the machine's name and versions into runs/devices.csv and prints it; DEVICE=cpu, cuda or
mps chooses, else the best one is taken.
"""
import csv, json, os, platform, re, shutil, signal, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RUNS = Path(os.environ.get('CARNB_RUNS') or ROOT/'runs')
DEVICE = os.environ.get('DEVICE') or 'auto'
SETTINGS = dict(arch='resnet10t', img_size=96, epochs=4, batch_size=32, pretrained='false', deterministic='true', device=DEVICE, ema=.9, tracking='[]', checkpoint_minutes=.02)

def train(experiment, stop=False):
    "Exit status of `carnb train`; with `stop`, killed after its first epoch"
    args = [str(BIN/'carnb'), 'train', '-p', 'experiment', experiment] + [w for k, v in SETTINGS.items() for w in ('-p', k, str(v))]
    p = subprocess.Popen(args, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, 'TQDM_DISABLE': '1'})
    said = ''
    for line in p.stdout:
        said += line
        if stop and re.match(r'\s+1 ', line):
            os.killpg(p.pid, signal.SIGKILL)
            break
    code = p.wait()
    if code and not stop: print(said[-1500:])
    return code

def result(experiment):
    "Weights and metrics of the one run"
    run = next((RUNS/experiment).glob('*/fold0'))
    metrics = json.loads((run/'metrics.json').read_text(encoding='utf8'))
    with open(run/'history.csv', newline='', encoding='utf8') as f: rows = list(csv.DictReader(f))
    return (run/'weights.safetensors').read_bytes(), metrics, max(float(r['images_s']) for r in rows)

def main():
    import torch
    sys.path.insert(0, str(ROOT))
    from carnb.machine import pick_device
    from carnb.run import environment
    device = pick_device(DEVICE)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    for e in ('device_check_whole', 'device_check_killed'): shutil.rmtree(RUNS/e, ignore_errors=True)
    t0 = time.time()
    print('training on %s (%s) ...' % (device, name), flush=True)
    ok = train('device_check_whole') == 0
    print('the same, killed after its first epoch and started again ...', flush=True)
    if ok:
        train('device_check_killed', stop=True)
        time.sleep(3) # the kernel notices that its parent is gone
        ok = train('device_check_killed') == 0
    same, speed, score = None, None, None
    if ok:
        (w, m, speed), (v, n, _) = result('device_check_whole'), result('device_check_killed')
        same, score = w == v and m['score'] == n['score'], m['score']
    print('memory study ...', flush=True)
    memory = subprocess.run([str(BIN/'carnb'), 'memory', '-p', 'measure', 'true', '-p', 'archs', 'resnet34,convnext_tiny', '-p', 'img_size', '224', '-p', 'batch_size', '8', '-p', 'device', DEVICE], cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    e = environment()
    row = dict(date=time.strftime('%Y-%m-%d'), device=str(device), name=name, system=platform.platform(), python=e['python'], torch=e['torch'], timm=e['timm'], fastai=e['fastai'], git=e['git'], trained=ok,
               resume_identical=same, images_s=speed and round(speed), score=score, memory_study=memory.returncode == 0, minutes=round((time.time()-t0)/60, 1))
    path = RUNS/'devices.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    old = list(csv.DictReader(open(path, newline='', encoding='utf8'))) if path.exists() else []
    with open(path, 'w', newline='', encoding='utf8') as f:
        w = csv.DictWriter(f, row)
        w.writeheader()
        w.writerows([{k: r.get(k, '') for k in row} for r in old] + [row])
    print('\n'.join('%-17s %s' % (k, v) for k, v in row.items()) + '\nwritten to %s' % os.path.relpath(str(path), str(ROOT)))
    if memory.returncode: print(memory.stdout[-800:])
    return int(not (ok and same and memory.returncode == 0))

if __name__ == '__main__': sys.exit(main())
