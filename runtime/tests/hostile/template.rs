//! Chat templates that never end, grow without bound, nest without bound, or reach outside.

use engraft_runtime::ErrorKind::{self, BadData, Unsupported};

use crate::hostile::run::{Cases, all};
use crate::hostile::subject;

/// Rendering may fill what its fuel pays: some 16 MiB of text, and the copies that grew it.
fn heap_max(len: usize) -> usize {
    (192 << 20) + 64 * len
}

const FUEL: &str = "out of fuel";

fn looped(body: &str) -> String {
    format!("{{% for i in range(10000) %}}{{% for j in range(10000) %}}{body}{{% endfor %}}{{% endfor %}}")
}

/// A namespace whose x is set 10,000 times.
fn grown(first: &str, next: &str, last: &str) -> String {
    format!(
        "{{% set ns = namespace(x={first}) %}}{{% for i in range(10000) %}}{{% for j in range(9) %}}{{% set ns.x = \
         {next} %}}{{% endfor %}}{{% endfor %}}{last}"
    )
}

#[test]
fn templates_are_refused_or_end() {
    let mut c = Cases::default();
    endless(&mut c);
    bombs(&mut c);
    twice_itself(&mut c);
    twice_itself_by_calls(&mut c);
    slow_methods(&mut c);
    deep_text(&mut c);
    deep_values(&mut c);
    foreign(&mut c);
    good(&mut c);
    assert!(c.0.len() >= 150, "only {} cases", c.0.len());
    all("chat templates", &c.0, subject::template, heap_max);
}

fn endless(c: &mut Cases) {
    for body in [
        "{{ j }}",
        "",
        "{{ i * j }}",
        "{{ messages[0].content }}",
        "{% set x = j %}",
        "{% if j %}{% endif %}",
    ] {
        c.refused(format!("loops of {body:?}"), Unsupported, FUEL, looped(body));
    }
    let recursion = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    c.refused("a macro that calls itself", Unsupported, "recursion", recursion);
    let two = "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}";
    c.refused("two macros that call each other", Unsupported, "", two);
    let twice = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}";
    c.refused("a macro that calls itself twice", Unsupported, "", twice);
    let recursive = "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}";
    c.refused("a recursive loop", Unsupported, "", recursive);
    c.refused("a range without end", Unsupported, "", "{% for i in range(10 ** 18) %}{{ i }}{% endfor %}");
    c.refused(
        "a call block around itself",
        Unsupported,
        "",
        "{% macro f() %}{% call f() %}x{% endcall %}{{ caller() }}{% endmacro %}{% call f() %}y{% endcall %}",
    );
}

fn bombs(c: &mut Cases) {
    for (name, expression) in [
        ("a text times", "'a' * 10 ** 9"),
        ("a text times more than u64", "'a' * 10 ** 30"),
        ("a list times", "[1] * 10 ** 9"),
        ("a list of lists times", "([[1] * 1000] * 1000)|tojson * 1000"),
        ("centred", "'a'|center(10 ** 9)"),
        ("indented", "('a\n' * 1000)|indent(10 ** 9)"),
        ("formatted wide", "'%1000000000d'|format(1)"),
        ("formatted deep", "'%.1000000000f'|format(1.0)"),
        ("replaced", "('a' * 10 ** 6)|replace('a', 'a' * 10 ** 6)"),
        ("replaced by method", "('a' * 10 ** 6).replace('a', 'a' * 10 ** 6)"),
        ("replaced nothing", "('a' * 10 ** 6)|replace('', 'a' * 10 ** 6)"),
        ("joined", "range(100000)|join('a' * 10 ** 5)"),
        ("joined by method", "('a' * 10 ** 5).join(range(100000))"),
        ("a power of powers", "'a' * 2 ** (2 ** (2 ** (2 ** 2)))"),
        ("split to letters", "('a' * 10 ** 7).split('a')|length"),
        ("split from behind", "('a' * 10 ** 7).rsplit('a')|length"),
        ("split to lines", "('\n' * 10 ** 7).splitlines()|length"),
        ("split at blanks", "('a ' * 10 ** 7).split()|length"),
        ("as a list", "('a' * 10 ** 7)|list|length"),
        ("the largest integer and one", "(170141183460469231731687303715884105727 + 1) ~ 'a' * 10 ** 9"),
    ] {
        c.refused(name, Unsupported, "", format!("{{{{ {expression} }}}}"));
    }
    let words = "{% for i in range(34) %}{{ 'a' * 100000 }}{% endfor %}";
    c.refused("three million letters to tokenize", Unsupported, "are allowed for these messages", words);
    c.refused("a range held", Unsupported, "too many elements", "{% set x = range(100000000) %}");
    c.refused("a range in a list", Unsupported, "too many elements", "{{ [range(100000000)] | length }}");
    c.refused(
        "a range of beginnings",
        Unsupported,
        "too many elements",
        "{{ 'a'.startswith(range(100000000)) }}",
    );
    c.refused("doubled", Unsupported, FUEL, grown("'aaaaaaaa'", "ns.x ~ ns.x", "{{ ns.x }}"));
    c.refused("doubled by plus", Unsupported, FUEL, grown("'aaaaaaaa'", "ns.x + ns.x", "{{ ns.x }}"));
    c.refused("a list doubled", Unsupported, "", grown("[1]", "ns.x + ns.x", "{{ ns.x }}"));
    c.refused(
        "a content doubled",
        Unsupported,
        FUEL,
        grown("messages[0].content", "ns.x ~ ns.x", "{{ ns.x }}"),
    );
    c.refused("a block doubled", Unsupported, FUEL,
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}");
}

/// Lists of twice themselves: small in memory, endless to write out or to compare.
fn twice_itself(c: &mut Cases) {
    let twice = grown("[1]", "[ns.x, ns.x]", "{{ ns.x|tojson }}");
    c.refused("a list of twice itself", Unsupported, FUEL, twice);
    for last in [
        "x|tojson",
        "x == y",
        "x in [y]",
        "[x, y]|sort",
        "{x: 1}",
        "[x]|unique|list",
        "x|string",
        "x ~ ''",
        "[x].count(y)",
    ] {
        let with: String = (0..30).map(|_| "{% with x = [x, x], y = [y, y] %}").collect();
        let ends = "{% endwith %}".repeat(30);
        let template = format!("{{% with x = [1], y = [1] %}}{with}{{{{ {last} }}}}{ends}{{% endwith %}}");
        c.refused(format!("twice itself in with: {last}"), Unsupported, "", template);
        let recursive = format!(
            "{{% macro f(x, y, n) %}}{{% if n %}}{{{{ f([x, x], [y, y], n - 1) }}}}{{% else %}}{{{{ {last} }}}}{{% endif \
             %}}{{% endmacro %}}{{{{ f([1], [1], 28) }}}}"
        );
        c.refused(format!("twice itself in a macro: {last}"), Unsupported, "", recursive);
    }
}

/// The same through what puts one value into several places where no bracket stands.
fn twice_itself_by_calls(c: &mut Cases) {
    let pairs = |v: &str| ["a", "b", "c", "d", "e", "g", "h", "i"].map(|k| format!("{k}={v}")).join(",");
    let dict = |v: &str| format!("dict({})", pairs(v));
    let map = |v: &str| format!("([0] * 8)|map('default', {v}, true)|list");
    let attribute = |v: &str| format!("([{{'a': {v}}}] * 8)|map(attribute='a')|list");
    let mut grow = |name: &str, of: &dyn Fn(&str) -> String| {
        for last in
            ["x == y", "x in [y]", "[x].count(y)", "x|tojson", "x|string", "x ~ ''", "x|pprint", "debug()"]
        {
            let template = format!(
                "{{% macro f(x, y, n) %}}{{% if n %}}{{{{ f({}, {}, n - 1) }}}}{{% else %}}{{{{ {last} }}}}{{% endif %}}\
                 {{% endmacro %}}{{{{ f(1, 1, 12) }}}}",
                of("x"),
                of("y")
            );
            c.refused(format!("{name} of itself in a macro: {last}"), Unsupported, "", template);
        }
    };
    grow("dict()", &dict);
    grow("map() with a default", &map);
    grow("map() of an attribute", &attribute);
    grow("dict() of map()", &|v| dict(&map(v)));
    let nested = (0..6).fold("1".to_string(), |v, _| format!("([0] * 1000)|map('default', {v}, true)|list"));
    c.refused(
        "map() in map() in one expression",
        Unsupported,
        FUEL,
        format!("{{{{ ({nested}) == ({nested}) }}}}"),
    );
}

/// Python's methods are ours: the engine knows nothing of the work they do.
fn slow_methods(c: &mut Cases) {
    for method in [
        "startswith('b')",
        "endswith('b')",
        "find('b')",
        "count('b')",
        "strip('b')",
        "lstrip('b')",
        "rstrip('b')",
        "isdigit()",
        "split('b')",
        "splitlines()",
        "upper()",
        "title()",
        "replace('b', 'c')",
    ] {
        let template = format!(
            "{{% set x = 'a' * 1000000 %}}{}",
            looped(&format!("{{% if x.{method} %}}{{% endif %}}"))
        );
        c.refused(format!("{method} again and again"), Unsupported, FUEL, template);
    }
    for method in ["keys()", "values()", "items()", "get('a')"] {
        let pairs: String = (0..100).map(|i| format!("'k{i}': {i},")).collect();
        let template =
            format!("{{% set x = {{{pairs}}} %}}{}", looped(&format!("{{% if x.{method} %}}{{% endif %}}")));
        c.refused(format!("{method} again and again"), Unsupported, FUEL, template);
    }
    for test in ["lower", "upper"] {
        let often = looped(&format!("{{% if x is {test} %}}{{% endif %}}"));
        let template = format!("{{% set x = 'a' * 1000000 %}}{often}");
        c.refused(format!("is {test} again and again"), Unsupported, "is unknown", template);
    }
    // Sets of characters as long as the text.
    for trim in [".strip(", ".lstrip(", ".rstrip(", "|trim("] {
        let (text, set) = ("('a' * 1000000)", "('b' * 1000000) ~ 'a'");
        c.refused(
            format!("{trim} of a long set"),
            Unsupported,
            FUEL,
            format!("{{{{ {text}{trim}{set}) }}}}"),
        );
        let set = set.replace("1000000", "50000");
        c.used(format!("{trim} of a set that is paid for"), format!("{{{{ ({text}{trim}{set}))|length }}}}"));
        let often = looped(&format!("{{% if x{trim}'b') %}}{{% endif %}}"));
        c.refused(
            format!("{trim} again and again"),
            Unsupported,
            FUEL,
            format!("{{% set x = 'a' * 1000000 %}}{often}"),
        );
    }
    // Blanks between marks, which trimming sees through.
    let marks = "{% set ns = namespace(x=messages[4].content) %}{% for i in range(11) %}{% set ns.x = ns.x ~ ns.x %}\
                 {% endfor %}{{ ns.x.strip()|length }}";
    c.used("four thousand marks are trimmed", marks.replace("messages[4]", "messages[3]"));
}

fn deep_text(c: &mut Cases) {
    const N: usize = 20_000;
    let chain = |part: &str| format!("{{{{ 1{} }}}}", part.repeat(N));
    for (name, text) in [
        ("pluses", chain("+1")),
        ("tildes", chain("~1")),
        ("powers", chain("**1")),
        ("products", chain("*1")),
        ("ors", chain(" or 1")),
        ("ands", chain(" and 1")),
        ("conditions", chain(" if 1 else 1")),
        ("conditions without else", chain(" if 1")),
        ("filters", chain("|e")),
        ("attributes", chain(".a")),
        ("items", chain("[0]")),
        ("calls", chain("()")),
        ("tests", chain(" is a")),
        ("comparisons", chain("<1")),
        ("nots", format!("{{{{ {}1 }}}}", "not ".repeat(N))),
        ("minuses", format!("{{{{ {}1 }}}}", "- ".repeat(N))),
        ("parentheses", format!("{{{{ {}1{} }}}}", "(".repeat(N), ")".repeat(N))),
        ("brackets", format!("{{{{ {}1{} }}}}", "[".repeat(N), "]".repeat(N))),
        ("braces", format!("{{{{ {}1{} }}}}", "{1:".repeat(N), "}".repeat(N))),
        ("open parentheses", format!("{{{{ {}", "(".repeat(N))),
        ("targets", format!("{{% set {}a{} = 1 %}}", "(".repeat(N), ")".repeat(N))),
        ("targets of for", format!("{{% for {}a{} in [] %}}{{% endfor %}}", "(".repeat(N), ")".repeat(N))),
        ("attributes of a target", format!("{{% set a{} = 1 %}}", ".a".repeat(N))),
        ("ifs", format!("{}{}", "{% if 1 %}".repeat(10_000), "{% endif %}".repeat(10_000))),
        ("open ifs", "{% if 1 %}".repeat(20_000)),
        ("elifs", format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(N))),
        ("fors", format!("{}{}", "{% for i in [1] %}".repeat(5000), "{% endfor %}".repeat(5000))),
        ("withs", format!("{}{}", "{% with a = 1 %}".repeat(5000), "{% endwith %}".repeat(5000))),
        ("filter blocks", format!("{}{}", "{% filter upper %}".repeat(5000), "{% endfilter %}".repeat(5000))),
        ("macros in macros", format!("{}{}", "{% macro m() %}".repeat(5000), "{% endmacro %}".repeat(5000))),
        (
            "macros of macros",
            (0..5000)
                .map(|i| {
                    format!("{{% macro m{} %}}{{{{ m{i} }}}}{{% endmacro %}}", i + 1)
                        .replace(" %}{", "() %}{")
                })
                .collect(),
        ),
    ] {
        c.refused(format!("20,000 {name}"), Unsupported, "", text);
    }
    c.refused("too long", Unsupported, "262144 are allowed", "a".repeat((1 << 18) + 1));
    c.used("as long as may be", format!("{}\n", "a".repeat((1 << 14) - 1)).repeat(16));
    // Columns and lines are counted in 16 bits, and an error was one more: a panic.
    for n in [(1 << 15) + 1, 65_534, 65_535, 65_536, 200_000] {
        for tag in [
            "{{ 1 }}",
            "{{ '",
            "{{ 1e",
            "{{ \u{1}",
            "{% if",
            "{{ 99999999999999999999999999999999999999999 }}",
            "{{ 'a\\q' }}",
        ] {
            c.refused(format!("{n} letters before {tag:?}"), Unsupported, "32768", "a".repeat(n) + tag);
            c.refused(format!("{n} lines before {tag:?}"), Unsupported, "32768", "\n".repeat(n) + tag);
        }
    }
}

fn deep_values(c: &mut Cases) {
    for (name, next) in [
        ("a list of itself", "[ns.x]"),
        ("a tuple of itself", "(ns.x,)"),
        ("a bare tuple of itself", "ns.x,"),
        ("a dictionary of itself", "{'a': ns.x}"),
        ("a namespace of itself", "namespace(a=ns.x)"),
        ("dict() of itself", "dict(a=ns.x)"),
        ("a list of itself behind a filter", "1|replace('x', 'y') or [ns.x]"),
        ("a default of itself", "none|default([ns.x], true)"),
        ("a list of itself in an index", "[[ns.x]][0]"),
        ("reversed", "[ns.x, ns.x]|reverse"),
        ("reversed and listed", "[ns.x]|reverse|list"),
        ("mapped", "[ns]|map(attribute='x')|list"),
        ("itself", "ns"),
        ("batched", "[ns.x]|batch(1)|list"),
        ("a slice of itself", "[ns.x][:]"),
        ("with itself behind", "[1] + [ns.x]"),
        ("items", "{'a': ns.x}|items|list"),
        ("dictsort", "{'a': ns.x}|dictsort"),
    ] {
        for last in ["", "{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == ns.x }}"] {
            let text = grown("[1]", next, last);
            c.refused(format!("{name}, then {last:?}"), Unsupported, "", text);
        }
    }
    let sets: String = "{% set x = [x] %}".repeat(10_000);
    c.refused("10,000 sets", Unsupported, "", format!("{{% set x = 1 %}}{sets}"));
    c.refused("a filtered set block", Unsupported, "a set block with filters",
        "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x|default([ns.x], true) %}{% endset %}{% endfor %}");
    let macros =
        "{% macro f(x, n) %}{{ f([[[[[[[[[[[[x]]]]]]]]]]]], n - 1) if n }}{% endmacro %}{{ f(1, 9999) }}";
    c.refused("nested by a macro", Unsupported, "", macros);
}

fn foreign(c: &mut Cases) {
    for tag in ["include 'x'", "include '/etc/passwd'", "import 'x' as x", "from 'x' import y", "extends 'x'"]
    {
        c.refused(tag, Unsupported, "unknown statement", format!("{{% {tag} %}}"));
    }
    for text in [
        "{{",
        "{%",
        "{% if",
        "{% for x in %}{% endfor %}",
        "{{ 'a }}",
        "{{ 1 + }}",
        "{% endfor %}",
        "{% nonsense %}",
        "{{ }}",
        "{% set = 1 %}",
        "{{ x | nofilter }}",
        "{{ f() }}",
        "{{ 'a'.encode() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 99999999999999999999999999999999999999999 }}",
        "{{ 1 / 0 }}",
        "{{ 1 // 0 }}",
        "{{ 1 % 0 }}",
        "{{ (0 - 9223372036854775807 - 1) // (0 - 1) ~ x.y.z }}",
        "{{ messages[0].content[:3] }}",
        "{{ messages[0].content[::-1] }}",
        "{{ messages[0].content|reverse }}",
        "{{ messages.append(1) }}",
        "{{ 'a'|tojson(indent='x') }}",
        "{{ namespace(x=1) }}",
    ] {
        c.refused(format!("{text:?}"), Unsupported, "", text);
    }
    let refuses = |kind: ErrorKind, c: &mut Cases, text: &str, part: &str| {
        c.refused(format!("{text:?} says"), kind, part, text)
    };
    refuses(BadData, c, "{{ raise_exception('no \u{1b}[2J tools') }}", "no  [2J tools");
    refuses(BadData, c, "{{ raise_exception('a' * 100000) }}", "the template refuses: aaaa");
    // What a person wrote is never repeated.
    refuses(
        BadData,
        c,
        "{{ raise_exception('bad: ' ~ messages[0].content ~ '!') }}",
        "the template refuses: bad: …!",
    );
    refuses(BadData, c, "{{ raise_exception('bad: ' ~ messages) }}", "'content': '…'");
    refuses(BadData, c, "{{ raise_exception('bad: ' ~ tools|tojson) }}", "\"name\": \"…\"");
    refuses(BadData, c, "{{ raise_exception(messages[0].content[:20]) }}", "at line 1: invalid operation");
}

fn good(c: &mut Cases) {
    for text in [
        "",
        "plain",
        "{# a comment #}",
        "{% raw %}{{ \" {% endraw %}{{ 1 }}",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}",
        "{% set ns = namespace(found=false, list=[]) %}{% for m in messages %}{% set ns.list = ns.list + [m.role] %}{% endfor \
         %}{{ ns.list | join(', ') }}",
        "{% set system, rest = messages[0], messages[1:] %}{{ system.content }}{% for m in rest %}{{ m.content }}{% endfor %}",
        "{% for (k, v) in {'a': 1, 'b': [2, (3, 4)]}.items() %}{{ k }}{{ v }}{% endfor %}",
        "{% if messages[0]['role'] in ['system', 'user'] and not (1, 2) == (1, 3) %}{{ 'yes' }}{% endif %}",
        "{%- macro schema(s, depth=0) -%}{%- if s is mapping -%}{%- for k, v in s | dictsort -%}{{ k }}{{ schema(v, depth + 1) \
         }}{%- endfor -%}{%- else -%}{{ s | tojson }}{%- endif -%}{%- endmacro -%}{{ schema(tools[0]) if tools }}",
        "{{ ([1, 2] + [3])[1] }}{{ [1, 2][0] }}{{ {'a': {'b': 1}}['a'].b }}{{ x[0] if x }}{{ (1, 2)|length }}",
        "{% with a = [1], b = {} %}{{ a }}{{ b }}{% endwith %}{{ dict(a=[1]).a[0] }}{{ [[]] }}{{ () }}{{ {} }}",
        "{% set a = [1, 2] | map('string') | list %}{{ a }}{% set b = range(3) %}{{ b | sum }}{% for i in b %}{{ loop.revindex \
         }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.previtem }}{% else %}none{% endfor %}",
        "{% set t %}{{ messages[0].content }}{% endset %}{{ t.strip() }}{{ tools[0].namespace if tools }}",
    ] {
        c.used(format!("{text:?} is used"), text);
    }
}
