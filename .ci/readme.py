"""README.md from nbs/index.ipynb. Only the standard library: it runs without an environment."""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'
HEAD = '<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->\n'

def relocate(text):
    "Links that are right in nbs/ become right on the top level; code is left alone"
    def link(m):
        target = m[2]
        if re.match(r'[a-z]+:|#|/', target): return m[0]
        if target.startswith('../'): return m[1] + target[3:] + m[3]
        return f'{m[1]}nbs/{target}{m[3]}'
    def outside_code(part):
        part = re.sub(r'(\]\()([^)\s]+)((?:\s+"[^"]*")?\))', link, part)
        return re.sub(r'(<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=")([^"]+)(")', link, part)
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else outside_code(p) for i, p in enumerate(parts))

def shown(output):
    "A cell's output as markdown"
    text = lambda v: ''.join(v) if isinstance(v, list) else v
    if output['output_type'] == 'error': raise SystemExit('nbs/index.ipynb holds an error output: execute it again')
    if output['output_type'] == 'stream': return '' if output['name'] == 'stderr' else f'```\n{text(output["text"]).rstrip()}\n```'
    data = output['data']
    if any(k.startswith('image/') for k in data): raise SystemExit('a README shows pictures from nbs/images only: save the figure there and link it')
    if 'text/markdown' in data: return text(data['text/markdown'])
    if 'text/html' in data: return re.sub(r'<style.*?</style>\s*|\sstyle="[^"]*"', '', text(data['text/html']), flags=re.S)
    return f'```\n{text(data["text/plain"]).rstrip()}\n```'

def convert():
    "The text of README.md"
    parts = []
    for cell in json.loads(SOURCE.read_text(encoding='utf8'))['cells']:
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown': parts.append(relocate(source))
        elif cell['cell_type'] == 'code' and source:
            lines = source.splitlines()
            marks = {l[2:].strip().replace(' ', '').rstrip(':') for l in lines if l.startswith('#|')}
            if marks & {'hide', 'include:false'}: continue
            code = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
            if code and not marks & {'echo:false', 'hide_input'}: parts.append(f'```python\n{code}\n```')
            if not marks & {'output:false', 'hide_output'}: parts += [relocate(s) for s in map(shown, cell['outputs']) if s]
    return HEAD + '\n' + '\n\n'.join(p.strip('\n') for p in parts if p) + '\n'

def main(args):
    if not SOURCE.exists():
        print('nbs/index.ipynb is not there: README.md is made from it', file=sys.stderr)
        return 1
    text = convert()
    prose = re.sub(r'^```.*?^```|`[^`\n]+`', '', text, flags=re.M | re.S)
    missing = sorted({m for m in re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', prose) if not (ROOT/m).exists()})
    TARGET.write_text(text, encoding='utf8')
    print(f'README.md has {len(text.splitlines())} lines')
    if missing: print('links without a file: ' + ', '.join(missing), file=sys.stderr)
    return int(bool(missing))

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
