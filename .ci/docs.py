"""The documentation site in _docs/: the notebooks as they were executed, nothing is run again.

1. `prepare` copies each notebook to _proc/docs: directives go, hidden cells go, exported cells get the documentation of
   what they define in front of them and fold their source away, names in backticks become links.
2. Sphinx with MyST-NB makes pages of them (`conf` below is all of its configuration).
3. `broken_links` walks through the result: a link without a target, or a script from the network, is an error.

(nbdev's own way needs Quarto, which no package registry ships, and executes every cell that holds an import.)
"""
import ast, configparser, importlib, io, json, re, shutil, sys, time, warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NBS, BUILD, SITE = ROOT/'nbs', ROOT/'_proc'/'docs', ROOT/'_docs'
PAGES = ['CONTRIBUTING.md', 'CHANGELOG.md'] # from the top level, beside the notebooks
GROUPS = {'Data': range(0, 4), 'Pieces': range(4, 10), 'Stages': range(10, 20), 'Results': range(20, 100)}

ini = configparser.ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf8')
cfg = ini['DEFAULT']

CSS = """
body { --pst-font-family-base: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans KR", "Noto Sans CJK KR", "Apple SD Gothic Neo", "Malgun Gothic", NanumGothic, sans-serif; word-break: keep-all; overflow-wrap: anywhere }
pre, code, kbd { word-break: normal; overflow-wrap: normal }
code.literal, code.literal .pre { white-space: normal; overflow-wrap: anywhere }
/* wide things scroll in their own box, so that a phone never scrolls the page sideways */
.bd-article table { display: block; width: fit-content; max-width: 100%; overflow-x: auto; font-size: .9em }
.bd-article td, .bd-article th { overflow-wrap: normal }
div.cell div.cell_output { overflow-x: auto; max-width: 100% }
div.math, mjx-container[display="true"] { overflow-x: auto; overflow-y: hidden; max-width: 100% }
.bd-article img { max-width: 100%; height: auto; background: #fff }
/* the sidebar has the search; a second bar above it has nothing to say */
.bd-header { display: none !important }
html { --pst-header-height: 0px; scroll-padding-top: 4rem }
.bd-main .bd-content .bd-article-container { max-width: 54rem }
.bd-article h1 { font-size: 2.1rem }
.bd-article h2 { font-size: 1.55rem; margin-top: 2.6rem }
.bd-article h3 { font-size: 1.2rem; margin-top: 2rem }
.bd-article div.highlight pre { font-size: .8rem }
div.cell details.hide summary, div.cell details.hide.above-input summary { font-size: .8rem; font-weight: normal }
@media (max-width: 600px) { .bd-article h1 { font-size: 1.7rem } .bd-article h2 { font-size: 1.35rem } .bd-article div.highlight pre { font-size: .72rem } }
"""

def conf():
    "Sphinx's configuration"
    return dict(
        project=cfg['title'], author=cfg['author'], copyright=cfg['copyright'], release=cfg['version'], language='en',
        extensions=['myst_nb', 'sphinx_copybutton', 'sphinx-mathjax-offline'], root_doc='index', exclude_patterns=['images'],
        nb_execution_mode='off', nb_code_prompt_show='Source', nb_code_prompt_hide='Source', nb_output_stderr='remove', nb_merge_streams=True, nb_render_markdown_format='myst',
        nb_mime_priority_overrides=[('html', 'text/markdown', 0)],
        myst_enable_extensions=['dollarmath', 'amsmath', 'deflist', 'attrs_inline', 'html_image'], myst_heading_anchors=4, myst_dmath_double_inline=True,
        suppress_warnings=['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure'],
        templates_path=[], html_theme='sphinx_book_theme', html_title=cfg['title'], html_static_path=['_own'], html_css_files=['carnb.css'],
        html_copy_source=False, html_show_sourcelink=False, html_last_updated_fmt=None,
        html_theme_options=dict(repository_url=cfg['git_url'], repository_branch=cfg['branch'], path_to_docs='nbs', use_repository_button=True,
            use_download_button=False, use_fullscreen_button=False, home_page_in_toc=True, show_navbar_depth=1, show_toc_level=2, icon_links=[]),
        copybutton_selector='div:not(.output) > div.highlight pre')


# Notebooks to pages

def slug(name): return re.sub(r'[^\w-]', '', name.lower()) # of a heading, as MyST makes it

def number(stem):
    m = re.match(r'(\d+)[a-z]?_', stem)
    return int(m[1]) if m else None

def module_of(path):
    "The module that a numbered notebook exports, without carnb (`ensemble.weights`; `ensemble` for `ensemble.__init__`); its name when it exports none"
    if number(path.stem) is None: return None
    text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf8'))['cells'] if c['cell_type'] == 'code')
    exported = re.search(r'^#\|\s*default_exp\s+(\S+)', text, re.M)
    return exported[1].removesuffix('.__init__') if exported else path.stem.split('_', 1)[1]

def file_of(module):
    "The file of a module of carnb; None when there is none"
    base = ROOT/'carnb'/module.replace('.', '/')
    return next((p for p in (base.with_name(base.name + '.py'), base/'__init__.py') if p.exists()), None)

def directives(text):
    "{name: value} of the `#|` lines, and the text without them"
    lines, found = text.splitlines(), {}
    for l in lines:
        if l.startswith('#|'):
            k, _, v = l[2:].strip().replace(':', ' ').partition(' ')
            found[k] = v.strip()
    return found, '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')

def parse(code):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return ast.parse(code).body
    except SyntaxError: return []

def full_name(n):
    "`name`, or `Class.name` for a method that fastcore's `patch` adds"
    if any(getattr(getattr(d, 'func', d), 'id', '').startswith('patch') for d in n.decorator_list):
        arg = getattr(n, 'args', None) and n.args.args[:1]
        if arg and isinstance(arg[0].annotation, ast.Name): return f'{arg[0].annotation.id}.{n.name}'
    return n.name

def defined(code):
    nodes = [n for n in parse(code) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return [full_name(n) for n in nodes if not n.name.startswith('_') and not full_name(n).startswith('_')]

def only_imports(code): return bool(b := parse(code)) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in b)

def shown_elsewhere(cells):
    "Names that the author documents with an own `show_doc` cell"
    return {m for c in cells if c['cell_type'] == 'code' for m in re.findall(r'^\s*show_doc\(([\w.]+)', ''.join(c['source']), re.M)}

def api(module, name):
    "Heading, signature with comments, and docstring as markdown"
    from nbdev.showdoc import show_doc
    obj = module
    for part in name.split('.'): obj = getattr(obj, part, None)
    if obj is None: return None
    try: text = show_doc(obj, name=name)._repr_markdown_()
    except Exception as e:
        print(f'  no documentation of {module.__name__}.{name}: {type(e).__name__}: {e}')
        return f'### {name}\n'
    text = re.sub(r'^---\s*\n+', '', text)
    return re.sub(r'^\[source\]\(.*\n+', '', text)

def cell_of(kind, source, tags=(), outputs=None):
    c = dict(cell_type=kind, metadata=dict(tags=list(tags)) if tags else {}, source=source)
    return c | (dict(outputs=outputs or [], execution_count=None) if kind == 'code' else {})

def symbols():
    "{name: page#anchor} of what the package documents; names that two modules share are left out"
    found, twice = {}, set()
    for p in sorted(NBS.glob('[0-9]*.ipynb')):
        seen = {}
        def anchor(heading):
            s = slug(heading)
            seen[s] = seen.get(s, -1) + 1
            return f'{s}-{seen[s]}' if seen[s] else s
        for c in json.loads(p.read_text(encoding='utf8'))['cells']:
            source = ''.join(c['source'])
            d, code = directives(source)
            if c['cell_type'] == 'markdown':
                for h in re.findall(r'^#{1,4}\s+(.*)$', re.sub(r'^```.*?^```', '', source, flags=re.M | re.S), re.M): anchor(h.replace('`', '').strip().replace(' ', '-'))
            elif c['cell_type'] == 'code' and {'export', 'exports'} & d.keys():
                for n in defined(code):
                    if n in found: twice.add(n)
                    found[n] = f'{p.name}#{anchor(n)}'
    return {n: t for n, t in found.items() if n not in twice}

def text_of(markdown, known, page):
    "Links that are right on the site; known names in backticks become links"
    def link(m):
        target = m[2]
        if re.match(r'[a-z]+:|#', target): return m[0]
        path, _, anchor = target.partition('#')
        path = re.sub(r'^(\.\./|nbs/)+', '', path)
        if path in ('README.md', ''): path = 'index.ipynb' if (NBS/'index.ipynb').exists() else 'index.md'
        if path.endswith('.ipynb') or path in PAGES or path.startswith('images/'): return m[1] + path + ('#' + anchor if anchor else '') + m[3]
        if (ROOT/path).exists() or (NBS/path).exists():
            kind = 'tree' if (ROOT/path).is_dir() else 'blob'
            return f'{m[1]}{cfg["git_url"]}/{kind}/{cfg["branch"]}/{path if (ROOT/path).exists() else "nbs/" + path}{m[3]}'
        return m[0]
    def name(m):
        plain = m[1].rstrip('()')
        if plain.startswith('carnb.'): # carnb.pooling.GeM, carnb.ensemble.weights.soften: without the modules
            parts = plain.split('.')
            plain = next((n for i in range(1, len(parts)) if (n := '.'.join(parts[i:])) in known), plain)
        return f'[`{m[1]}`]({known[plain]})' if plain in known and not known[plain].endswith(f'{page}#') else m[0]
    out = []
    for i, part in enumerate(re.split(r'(^```.*?^```|^\$\$.*?\$\$)', markdown, flags=re.M | re.S)):
        if not i % 2:
            part = re.sub(r'(\]\()([^)\s]+)((?:\s+"[^"]*")?\))', link, part)
            part = re.sub(r'(<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=")([^"]+)(")', link, part)
            part = '\n'.join(l if l.startswith('#') else re.sub(r'(?<![\[`])`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])', name, l) for l in part.split('\n'))
        out.append(part)
    return ''.join(out)

def prepare(path, known):
    "A notebook as Sphinx shall read it"
    nb = json.loads(path.read_text(encoding='utf8'))
    cells = []
    name = module_of(path)
    module = importlib.import_module(f'carnb.{name}') if name and file_of(name) else None
    elsewhere = shown_elsewhere(nb['cells'])
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code':
            if c['cell_type'] == 'markdown': cells.append(cell_of('markdown', text_of(source, known, path.name)))
            continue
        d, code = directives(source)
        if {'hide', 'default_exp'} & d.keys() or d.get('include') == 'false' or 'nbdev_export(' in code or not code.strip(): continue
        tags = set(c['metadata'].get('tags', []))
        outputs = [] if 'hide_output' in d or d.get('output') == 'false' else c['outputs']
        shown = re.findall(r'^\s*show_doc\(([\w.]+)', code, re.M)
        if shown and module:
            cells += [cell_of('markdown', a) for n in shown if (a := api(module, n))]
            continue
        if {'export', 'exports', 'exporti'} & d.keys():
            names = [n for n in defined(code) if n not in elsewhere] if 'exporti' not in d and module else []
            cells += [cell_of('markdown', a) for n in names if (a := api(module, n))]
            if defined(code) or only_imports(code) or len(code.splitlines()) > 25: tags.add('hide-input')
        if 'hide_input' in d or d.get('echo') == 'false': tags.add('remove-input')
        if d.get('code-fold') in ('true', 'hide'): tags.add('hide-input')
        cells.append(cell_of('code', code, sorted(tags), outputs))
    if not cells or not re.match(r'\s*#\s', cells[0]['source']): cells.insert(0, cell_of('markdown', f'# {name or cfg["title"]}'))
    nb['cells'] = cells
    nb['metadata'] = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3'))
    nb.update(nbformat=4, nbformat_minor=4)
    return nb

def contents(stems, pages):
    "The tables of contents as MyST directives"
    def toctree(caption, entries): return '```{toctree}\n:hidden:\n:maxdepth: 1\n:caption: ' + caption + '\n\n' + '\n'.join(entries) + '\n```\n'
    parts = []
    for caption, numbers in GROUPS.items():
        entries = [f'{s.split("_", 1)[0]} {module_of(NBS/f"{s}.ipynb")} <{s}>' for s in stems if number(s) in numbers]
        if entries: parts.append(toctree(caption, entries))
    if pages: parts.append(toctree('Project', [f'{p[:-3].capitalize()} <{p[:-3]}>' for p in pages]))
    return '\n'.join(parts)

def prepare_all():
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD/'_own').mkdir(parents=True)
    (BUILD/'_own'/'carnb.css').write_text(CSS, encoding='utf8')
    if (NBS/'images').is_dir(): shutil.copytree(NBS/'images', BUILD/'images')
    known, stems = symbols(), sorted(p.stem for p in NBS.glob('[0-9]*.ipynb'))
    pages = [p for p in PAGES if (ROOT/p).exists()]
    for p in pages: (BUILD/p).write_text(text_of((ROOT/p).read_text(encoding='utf8'), known, p), encoding='utf8')
    for s in stems: (BUILD/f'{s}.ipynb').write_text(json.dumps(prepare(NBS/f'{s}.ipynb', known), ensure_ascii=False), encoding='utf8')
    if (NBS/'index.ipynb').exists():
        nb = prepare(NBS/'index.ipynb', known)
        nb['cells'].append(cell_of('markdown', contents(stems, pages)))
        (BUILD/'index.ipynb').write_text(json.dumps(nb, ensure_ascii=False), encoding='utf8')
    else:
        (BUILD/'index.md').write_text(f'# {cfg["title"]}\n\n{cfg["description"]}.\n\n' + contents(stems, pages), encoding='utf8')
    return len(stems) + len(pages) + 1


# Pages to a site

class Refs(HTMLParser):
    def __init__(self):
        super().__init__()
        self.refs, self.ids, self.loads = [], set(), []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        for k in ('href', 'src'):
            if a.get(k): (self.loads if tag in ('script', 'img', 'iframe') or tag == 'link' and a.get('rel') == 'stylesheet' else self.refs).append(a[k])

def broken_links(site):
    "Local links without a target, and what a page would load from the network"
    pages, problems = {}, []
    for p in sorted(site.glob('*.html')):
        pages[p] = Refs()
        pages[p].feed(p.read_text(encoding='utf8'))
    for p, r in pages.items():
        for ref in r.refs + r.loads:
            u = urlsplit(ref)
            if u.scheme == 'data': continue
            if u.scheme or u.netloc:
                if ref in r.loads: problems.append(f'{p.name} loads {ref} from the network')
                continue
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            if not to.exists(): problems.append(f'{p.name}: {ref} leads nowhere')
            elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids | {'top'}: problems.append(f'{p.name}: {ref}: no such place on that page')
    return sorted(set(problems))

def main():
    t = time.time()
    n = prepare_all()
    print(f'{n} pages prepared in {time.time()-t:.0f} s', flush=True)
    from sphinx.application import Sphinx
    html, said = BUILD.parent/'html', io.StringIO() # MyST-NB writes beside it
    shutil.rmtree(html, ignore_errors=True)
    app = Sphinx(BUILD, None, html, BUILD.parent/'doctrees', 'html', confoverrides=conf(), status=None, warning=said, freshenv=True)
    app.build()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(html, SITE)
    found = [re.sub(r'\x1b\[[0-9;]*m', '', l).replace(str(BUILD), 'nbs') for l in said.getvalue().splitlines() if l.strip()]
    found = [l for l in dict.fromkeys(found) if re.search('WARNING|ERROR', l)]
    for l in found: print('  ' + l)
    broken = broken_links(SITE)
    for l in broken: print('  broken: ' + l)
    print(f'{len(list(SITE.glob("*.html")))} pages in _docs/index.html after {time.time()-t:.0f} s: {len(found)} warnings, {len(broken)} broken links', flush=True)
    return int(bool(broken) or app.statuscode != 0)

if __name__ == '__main__': sys.exit(main())
