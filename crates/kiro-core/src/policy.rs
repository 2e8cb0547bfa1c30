//! May this caller make this call?
//!
//! Deny by default: a call passes only if a line of the mesh file's `allow` fits it. Both ends ask, each with its own copy
//! compiled from the same file; the destination's word counts.
//!
//! **Invariant**: a lookup allocates nothing and takes time by the edge's own lines, not by the mesh's size.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

use crate::identity::ServiceName;
use crate::mesh::{Allow, Mesh, Mode, Source};
use crate::path::PathPattern;

/// The allowed edges that start or end at one service.
#[derive(Clone, Debug)]
pub struct Policy {
    me: ServiceName,
    mode: Mode,
    from_ingress: Edge,
    from: BTreeMap<ServiceName, Edge>,
    to: BTreeMap<ServiceName, Edge>,
}

/// The lines of one edge: one that fits is enough. None: nothing is allowed.
#[derive(Clone, Debug, Default)]
struct Edge(Vec<Rule>);

/// The lines of a large mesh have few sets of methods and of paths, so each set is there once.
#[derive(Clone, Debug)]
struct Rule {
    /// None: every method.
    methods: Option<Arc<[String]>>,
    /// None: every path.
    paths: Option<Arc<[PathPattern]>>,
}

/// The sets that are there so far.
#[derive(Default)]
struct Sets {
    methods: HashSet<Arc<[String]>>,
    paths: HashSet<Arc<[PathPattern]>>,
}

/// A line of the policy, as people read it.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    from: &'a str,
    to: &'a str,
    rule: &'a Rule,
}

/// Who calls, as its connection proves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller<'a> {
    /// Somebody outside the mesh, by this sidecar's ingress.
    Ingress,
    /// A service, by its sidecar's certificate.
    Service(&'a str),
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The method; a WebSocket's is GET.
    pub method: &'a str,
    /// The raw path without its query, which has passed [`crate::path::screen`].
    pub path: &'a str,
    /// What that said of it.
    pub ambiguous: bool,
    /// A request, or bytes both ways.
    pub kind: CallKind,
}

/// The two kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallKind {
    /// A request with a method and a path; a WebSocket's handshake is one.
    Request,
    /// CONNECT. Nobody sees what goes through it, so no line with methods or paths allows it.
    Tunnel,
}

/// What the policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A line fits.
    Allowed,
    /// No line fits, and the mesh only watches (`mode: audit`): let it pass and log it.
    Audited(Denial),
    /// No line fits.
    Denied(Denial),
}

/// Why no line fits: the nearest miss among the edge's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Denial {
    /// No line has this source and destination.
    NoEdge,
    /// No line of the edge has this method.
    Method,
    /// No line of the edge with this method has this path.
    Path,
    /// The path would have to decide, and servers read it in different ways.
    AmbiguousPath,
    /// All lines of the edge have methods or paths, which a tunnel would get round.
    TunnelRestricted,
}

impl Denial {
    /// The name of the reason, for the answer, the log and the metrics.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Denial::NoEdge => "policy_no_edge",
            Denial::Method => "policy_method",
            Denial::Path => "policy_path",
            Denial::AmbiguousPath => "policy_ambiguous_path",
            Denial::TunnelRestricted => "policy_tunnel",
        }
    }
}

impl Policy {
    /// Compiles the part of a mesh file that concerns one service.
    #[must_use]
    pub fn for_service(mesh: &Mesh, me: &ServiceName) -> Policy {
        let mut sets = Sets::default();
        let mut policy = Policy {
            me: me.clone(),
            mode: mesh.mode,
            from_ingress: Edge::default(),
            from: BTreeMap::new(),
            to: BTreeMap::new(),
        };
        for line in &mesh.allow {
            match &line.from {
                Source::Ingress if line.to == *me => policy.from_ingress.add(line, &mut sets),
                Source::Service(from) if line.to == *me => {
                    policy.from.entry(from.clone()).or_default().add(line, &mut sets)
                }
                Source::Service(from) if from == me => {
                    policy.to.entry(line.to.clone()).or_default().add(line, &mut sets)
                }
                Source::Ingress | Source::Service(_) => {}
            }
        }
        for edge in policy.from.values_mut().chain(policy.to.values_mut()) {
            edge.0.shrink_to_fit();
        }
        policy
    }

    /// All lines: from outside, from others, to others, each in the order of the names and then of the file.
    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        let me = self.me.as_str();
        let ingress = ("ingress", me, &self.from_ingress);
        let from = self.from.iter().map(move |(from, edge)| (from.as_str(), me, edge));
        let to = self.to.iter().map(move |(to, edge)| (me, to.as_str(), edge));
        let edges = std::iter::once(ingress).chain(from).chain(to);
        edges.flat_map(|(from, to, edge)| edge.0.iter().map(move |rule| Line { from, to, rule }))
    }

    /// Whether a call from `from` may reach this service.
    #[must_use]
    pub fn authorize_inbound(&self, from: Caller<'_>, call: &Call<'_>) -> Verdict {
        let edge = match from {
            Caller::Ingress => Some(&self.from_ingress),
            Caller::Service(name) => self.from.get(name),
        };
        self.verdict(edge, call)
    }

    /// Whether this service may make a call to `to`.
    #[must_use]
    pub fn authorize_outbound(&self, to: &str, call: &Call<'_>) -> Verdict {
        self.verdict(self.to.get(to), call)
    }

    fn verdict(&self, edge: Option<&Edge>, call: &Call<'_>) -> Verdict {
        let judged = edge.map_or(Err(Denial::NoEdge), |edge| edge.judge(call));
        match (judged, self.mode) {
            (Ok(()), Mode::Enforce | Mode::Audit) => Verdict::Allowed,
            (Err(denial), Mode::Enforce) => Verdict::Denied(denial),
            (Err(denial), Mode::Audit) => Verdict::Audited(denial),
        }
    }
}

impl Edge {
    fn add(&mut self, line: &Allow, sets: &mut Sets) {
        let methods = line.methods.as_deref().map(|methods| one_of(&mut sets.methods, methods));
        let paths = line.paths.as_deref().map(|paths| one_of(&mut sets.paths, paths));
        self.0.push(Rule { methods, paths });
    }

    fn judge(&self, call: &Call<'_>) -> Result<(), Denial> {
        let mut nearest = Denial::NoEdge;
        for rule in &self.0 {
            match rule.judge(call) {
                Ok(()) => return Ok(()),
                // The variants are declared in the order of how far a call got.
                Err(miss) => nearest = nearest.max(miss),
            }
        }
        Err(nearest)
    }
}

impl Rule {
    fn judge(&self, call: &Call<'_>) -> Result<(), Denial> {
        match call.kind {
            CallKind::Tunnel if self.methods.is_none() && self.paths.is_none() => Ok(()),
            CallKind::Tunnel => Err(Denial::TunnelRestricted),
            CallKind::Request => self.judge_request(call),
        }
    }

    fn judge_request(&self, call: &Call<'_>) -> Result<(), Denial> {
        // RFC 9110, 9.3.2: HEAD is GET without the content, so it shows less than what is allowed.
        let fits = |method: &String| method == call.method || (method == "GET" && call.method == "HEAD");
        if self.methods.as_ref().is_some_and(|methods| !methods.iter().any(fits)) {
            return Err(Denial::Method);
        }
        let Some(paths) = &self.paths else { return Ok(()) };
        if call.ambiguous {
            return Err(Denial::AmbiguousPath);
        }
        if paths.iter().any(|pattern| pattern.matches(call.path)) { Ok(()) } else { Err(Denial::Path) }
    }
}

/// The set that is equal to `wanted`; a new one, if there is none yet.
fn one_of<T: Clone + Eq + Hash>(sets: &mut HashSet<Arc<[T]>>, wanted: &[T]) -> Arc<[T]> {
    if let Some(known) = sets.get(wanted) {
        return Arc::clone(known);
    }
    let new: Arc<[T]> = wanted.into();
    sets.insert(Arc::clone(&new));
    new
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}: ", self.from, self.to)?;
        match &self.rule.methods {
            None => f.write_str("any method")?,
            Some(methods) => f.write_str(&methods.join(" "))?,
        }
        f.write_str(", ")?;
        let Some(paths) = &self.rule.paths else { return f.write_str("any path") };
        for (place, path) in paths.iter().enumerate() {
            let space = if place > 0 { " " } else { "" };
            write!(f, "{space}{path}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path;

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    fn mesh(mode: &str, allow: &str) -> Mesh {
        let text = format!(
            "trust_domain: kiro.mesh\nmode: {mode}\nservices:\n  \
             web: {{ app: {{ port: 1 }}, ingress: {{ port: 8080 }} }}\n  \
             profile: {{ app: {{ port: 2 }} }}\n  \
             auth: {{ app: {{ port: 3 }} }}\n  \
             db: {{ app: {{ port: 4, protocol: tcp }} }}\n\
             allow:\n  - {{ from: ingress, to: web, methods: [GET], paths: [/public/**] }}\n{allow}"
        );
        crate::mesh::parse(&text).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
    }

    fn request<'a>(method: &'a str, path: &'a str) -> Call<'a> {
        Call { method, path, ambiguous: path::screen(path).unwrap().ambiguous, kind: CallKind::Request }
    }

    const TUNNEL: Call<'static> =
        Call { method: "CONNECT", path: "/", ambiguous: false, kind: CallKind::Tunnel };

    const ALLOW: &str = "  \
        - { from: web, to: profile, methods: [GET], paths: [\"/profiles/*\"] }\n  \
        - { from: web, to: profile, methods: [POST], paths: [/profiles] }\n  \
        - { from: web, to: auth }\n  \
        - { from: profile, to: auth, methods: [POST] }\n  \
        - { from: auth, to: profile, paths: [/**] }\n  \
        - { from: profile, to: db }\n";

    /// Asks both ends about a call between two services.
    #[track_caller]
    fn check(from: &str, to: &str, call: &Call<'_>, expected: Result<(), Denial>) {
        for (mode, refusal) in
            [("enforce", Verdict::Denied as fn(Denial) -> Verdict), ("audit", Verdict::Audited)]
        {
            let mesh = mesh(mode, ALLOW);
            let expected = expected.map_or_else(refusal, |()| Verdict::Allowed);
            let inbound = Policy::for_service(&mesh, &name(to));
            assert_eq!(
                inbound.authorize_inbound(Caller::Service(from), call),
                expected,
                "{from} > {to} {call:?}"
            );
            let outbound = Policy::for_service(&mesh, &name(from));
            assert_eq!(outbound.authorize_outbound(to, call), expected, "{from} > {to} {call:?}");
        }
    }

    #[test]
    fn a_line_allows_its_edge_methods_and_paths() {
        check("web", "profile", &request("GET", "/profiles/alice"), Ok(()));
        check("web", "profile", &request("POST", "/profiles"), Ok(()));
        check("web", "auth", &request("BREW", "/anything"), Ok(()));
        check("profile", "auth", &request("POST", "/any/path"), Ok(()));
        check("auth", "profile", &request("DELETE", "/"), Ok(()));
    }

    #[test]
    fn its_lines_can_be_read() {
        let shown = |service: &str| -> Vec<String> {
            Policy::for_service(&mesh("enforce", ALLOW), &name(service))
                .lines()
                .map(|line| line.to_string())
                .collect()
        };
        assert_eq!(
            shown("profile"),
            [
                "auth -> profile: any method, /**",
                "web -> profile: GET, /profiles/*",
                "web -> profile: POST, /profiles",
                "profile -> auth: POST, any path",
                "profile -> db: any method, any path",
            ]
        );
        assert_eq!(shown("web").first().unwrap(), "ingress -> web: GET, /public/**");
    }

    #[test]
    fn equal_sets_of_methods_and_paths_are_there_once() {
        let allow = "  - { from: web, to: profile, methods: [GET], paths: [/x, /y] }\n  \
                     - { from: web, to: auth, methods: [GET], paths: [/x, /y] }\n";
        let policy = Policy::for_service(&mesh("enforce", allow), &name("web"));
        let sets: Vec<_> = policy.to.values().flat_map(|edge| &edge.0).collect();
        let [first, second] = sets[..] else { panic!("{sets:?}") };
        assert!(Arc::ptr_eq(first.methods.as_ref().unwrap(), second.methods.as_ref().unwrap()));
        assert!(Arc::ptr_eq(first.paths.as_ref().unwrap(), second.paths.as_ref().unwrap()));
    }

    #[test]
    fn everything_else_is_denied_with_the_nearest_miss() {
        check("profile", "web", &request("GET", "/"), Err(Denial::NoEdge));
        check("auth", "web", &request("GET", "/public/x"), Err(Denial::NoEdge));
        check("db", "profile", &request("GET", "/"), Err(Denial::NoEdge));
        check("profile", "auth", &request("GET", "/"), Err(Denial::Method));
        check("profile", "auth", &request("post", "/"), Err(Denial::Method));
        check("web", "profile", &request("DELETE", "/profiles/alice"), Err(Denial::Method));
        check("web", "profile", &request("GET", "/profiles"), Err(Denial::Path));
        check("web", "profile", &request("POST", "/profiles/alice"), Err(Denial::Path));
        check("web", "profile", &request("GET", "/profiles/alice/posts"), Err(Denial::Path));
    }

    #[test]
    fn unknown_names_and_the_service_itself_have_no_edge() {
        let mesh = mesh("enforce", ALLOW);
        let policy = Policy::for_service(&mesh, &name("auth"));
        let call = request("GET", "/");
        for other in ["auth", "ingress", "stranger", "", "WEB", "web."] {
            assert_eq!(
                policy.authorize_inbound(Caller::Service(other), &call),
                Verdict::Denied(Denial::NoEdge),
                "{other}"
            );
            assert_eq!(policy.authorize_outbound(other, &call), Verdict::Denied(Denial::NoEdge), "{other}");
        }
    }

    #[test]
    fn the_ingress_is_a_source_of_its_own() {
        let mesh = mesh("enforce", ALLOW);
        let web = Policy::for_service(&mesh, &name("web"));
        let auth = Policy::for_service(&mesh, &name("auth"));
        let ask =
            |policy: &Policy, path: &str| policy.authorize_inbound(Caller::Ingress, &request("GET", path));
        assert_eq!(ask(&web, "/public/a"), Verdict::Allowed);
        assert_eq!(ask(&web, "/private"), Verdict::Denied(Denial::Path));
        assert_eq!(ask(&auth, "/public/a"), Verdict::Denied(Denial::NoEdge));
        // A service can't pass for the ingress by its name.
        let from = Caller::Service("ingress");
        assert_eq!(
            web.authorize_inbound(from, &request("GET", "/public/a")),
            Verdict::Denied(Denial::NoEdge)
        );
    }

    #[test]
    fn get_allows_head_and_nothing_else_is_implied() {
        check("web", "profile", &request("HEAD", "/profiles/alice"), Ok(()));
        check("profile", "auth", &request("HEAD", "/"), Err(Denial::Method));
        check("web", "profile", &request("OPTIONS", "/profiles/alice"), Err(Denial::Method));
    }

    #[test]
    fn an_ambiguous_path_is_refused_only_where_paths_decide() {
        for path in
            ["/profiles//alice", "/profiles/a%2Fb", "/profiles/a;b", "/profiles/a%5cb", "/profiles\\a"]
        {
            check("web", "profile", &request("GET", path), Err(Denial::AmbiguousPath));
            check("auth", "profile", &request("GET", path), Err(Denial::AmbiguousPath));
            check("web", "profile", &request("DELETE", path), Err(Denial::Method));
            check("web", "auth", &request("GET", path), Ok(()));
            check("profile", "auth", &request("POST", path), Ok(()));
        }
    }

    #[test]
    fn a_tunnel_needs_a_line_without_methods_and_paths() {
        check("profile", "db", &TUNNEL, Ok(()));
        check("web", "auth", &TUNNEL, Ok(()));
        check("web", "profile", &TUNNEL, Err(Denial::TunnelRestricted));
        check("profile", "auth", &TUNNEL, Err(Denial::TunnelRestricted));
        check("auth", "profile", &TUNNEL, Err(Denial::TunnelRestricted));
        check("web", "db", &TUNNEL, Err(Denial::NoEdge));
    }

    #[test]
    fn codes_differ() {
        let all =
            [Denial::NoEdge, Denial::Method, Denial::Path, Denial::AmbiguousPath, Denial::TunnelRestricted]
                .map(Denial::code);
        assert_eq!(std::collections::BTreeSet::from(all).len(), all.len());
        assert!(all.iter().all(|code| code.starts_with("policy_")));
    }

    /// A linear congruential generator (Knuth's MMIX): the same seed gives the same mesh on every machine.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(self.0 >> 33).unwrap() % bound
        }

        fn pick<T: Copy>(&mut self, of: &[T]) -> T {
            of[self.below(of.len())]
        }

        fn some_of<T: Copy>(&mut self, of: &[T]) -> Option<Vec<T>> {
            (self.below(3) > 0).then(|| (0..=self.below(2)).map(|_| self.pick(of)).collect())
        }
    }

    const SERVICES: [&str; 3] = ["web", "profile", "auth"];
    const METHODS: [&str; 4] = ["GET", "HEAD", "POST", "DELETE"];
    const PATTERNS: [&str; 7] = ["/", "/a", "/a/", "/a/*", "/a/**", "/*/b", "/**"];
    const PATHS: [&str; 12] =
        ["/", "/a", "/%61", "/a/", "/a/b", "/a/%62", "/a/b/", "/c/b", "/a//b", "/a%2Fb", "/a;b", "/a/b/c"];

    /// A pattern read the long way round: every segment spelled out.
    fn fits(pattern: &str, path: &str) -> bool {
        let path = path.replace("%61", "a").replace("%62", "b");
        let parts: Vec<&str> = path.split('/').collect();
        let wanted: Vec<&str> = pattern.split('/').collect();
        let open = wanted.last() == Some(&"**");
        let fixed = wanted.len() - usize::from(open);
        let length = if open { parts.len() > fixed } else { parts.len() == fixed };
        length
            && (0..fixed).all(|i| if wanted[i] == "*" { !parts[i].is_empty() } else { wanted[i] == parts[i] })
    }

    /// The rules of an edge, asked one after the other on the mesh file's own lines.
    fn naively(mesh: &Mesh, from: Option<&str>, to: &str, call: &Call<'_>) -> Result<(), Denial> {
        let source = |line: &Allow| match &line.from {
            Source::Ingress => from.is_none(),
            Source::Service(name) => from == Some(name.as_str()),
        };
        let lines: Vec<&Allow> =
            mesh.allow.iter().filter(|line| source(line) && line.to.as_str() == to).collect();
        if lines.is_empty() {
            return Err(Denial::NoEdge);
        }
        if call.kind == CallKind::Tunnel {
            let open = lines.iter().any(|line| line.methods.is_none() && line.paths.is_none());
            return if open { Ok(()) } else { Err(Denial::TunnelRestricted) };
        }
        let method = |line: &&&Allow| {
            line.methods.as_ref().is_none_or(|methods| {
                methods.iter().any(|method| method == call.method)
                    || (call.method == "HEAD" && methods.iter().any(|method| method == "GET"))
            })
        };
        let lines: Vec<&&Allow> = lines.iter().filter(method).collect();
        if lines.is_empty() {
            return Err(Denial::Method);
        }
        if lines.iter().any(|line| line.paths.is_none()) {
            return Ok(());
        }
        if call.ambiguous {
            return Err(Denial::AmbiguousPath);
        }
        let path =
            |line: &&&Allow| line.paths.iter().flatten().any(|pattern| fits(&pattern.to_string(), call.path));
        if lines.iter().any(path) { Ok(()) } else { Err(Denial::Path) }
    }

    fn random_line(random: &mut Random) -> String {
        let from = random.pick(&["web", "profile", "auth", "ingress"]);
        let to = if from == "ingress" { "web" } else { random.pick(&SERVICES) };
        if from == to {
            return String::new();
        }
        let list = |name: &str, items: Option<Vec<&str>>| match items {
            Some(items) => format!(", {name}: [\"{}\"]", items.join("\", \"")),
            None => String::new(),
        };
        let methods = list("methods", random.some_of(&METHODS));
        let paths = list("paths", random.some_of(&PATTERNS));
        format!("  - {{ from: {from}, to: {to}{methods}{paths} }}\n")
    }

    #[test]
    fn the_compiled_policy_says_what_the_lines_say() {
        let mut seen = std::collections::BTreeMap::new();
        for seed in 0..300 {
            let mut random = Random(seed);
            let allow: String = (0..random.below(12)).map(|_| random_line(&mut random)).collect();
            let mesh = mesh("enforce", &allow);
            let policies = SERVICES.map(|service| (service, Policy::for_service(&mesh, &name(service))));
            for (from, outbound) in &policies {
                for (to, inbound) in &policies {
                    let call = match random.below(8) {
                        0 => TUNNEL,
                        _ => request(random.pick(&METHODS), random.pick(&PATHS)),
                    };
                    let expected = naively(&mesh, Some(from), to, &call);
                    let verdict = expected.map_or_else(Verdict::Denied, |()| Verdict::Allowed);
                    let context = || format!("seed {seed}: {from} > {to} {call:?}\n{allow}");
                    assert_eq!(
                        inbound.authorize_inbound(Caller::Service(from), &call),
                        verdict,
                        "{}",
                        context()
                    );
                    assert_eq!(outbound.authorize_outbound(to, &call), verdict, "{}", context());
                    *seen.entry(format!("{expected:?}")).or_insert(0) += 1;
                    let expected =
                        naively(&mesh, None, to, &call).map_or_else(Verdict::Denied, |()| Verdict::Allowed);
                    assert_eq!(inbound.authorize_inbound(Caller::Ingress, &call), expected, "{}", context());
                }
            }
        }
        // Every answer has been given many times, else the calls do not try the rules.
        assert_eq!(seen.len(), 6, "{seen:?}");
        assert!(seen.values().all(|count| *count >= 20), "{seen:?}");
    }
}
