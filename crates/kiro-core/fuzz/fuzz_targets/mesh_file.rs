//! Does any mesh file make the reader fail, or get past its own rules?
#![no_main]

use kiro_core::mesh::{self, SIDECAR_PORTS, Source};
use kiro_core::policy::{Call, CallKind, Caller, Policy, Verdict};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| match mesh::parse(text) {
    Err(mesh::Problems(problems)) => {
        assert!(!problems.is_empty());
        let lines = text.split(['\n', '\r']).count();
        for problem in problems {
            assert!(problem.line >= 1 && problem.line <= lines, "{problem:?}");
            assert!(problem.column >= 1, "{problem:?}");
            assert!(!problem.what.is_empty() && !problem.fix.is_empty(), "{problem:?}");
            assert!(!problem.to_string().replace("\n  fix: ", "").contains(char::is_control), "{problem:?}");
        }
    }
    Ok(mesh) => {
        assert!(!mesh.services.is_empty());
        for (name, service) in &mesh.services {
            assert!(service.app.port > 0);
            assert!(SIDECAR_PORTS.iter().all(|(port, _)| *port != service.app.port));
            let opened = mesh.allow.iter().any(|line| line.from == Source::Ingress && line.to == *name);
            assert_eq!(service.ingress.is_some(), opened);
            let policy = Policy::for_service(&mesh, name);
            let call = Call { method: "GET", path: "/", ambiguous: false, kind: CallKind::Request };
            if !opened && mesh.mode == mesh::Mode::Enforce {
                assert!(matches!(policy.authorize_inbound(Caller::Ingress, &call), Verdict::Denied(_)));
            }
        }
        for line in &mesh.allow {
            assert!(mesh.services.contains_key(&line.to));
            if let Source::Service(from) = &line.from {
                assert!(from != &line.to && mesh.services.contains_key(from));
            }
        }
    }
});
