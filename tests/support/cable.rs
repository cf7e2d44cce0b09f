//! A cable between dynabase and its upstream that a test can cut and mend: a TCP forwarder on a port of its own.

use std::{
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// See the module's description.
#[derive(Debug)]
pub struct Cable {
    pub port: u16,
    target: SocketAddr,
    up: Arc<AtomicBool>,
    ends: Arc<Mutex<Vec<TcpStream>>>,
}

impl Cable {
    /// A cable to `port` on this machine, mended.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let cable = Self {
            port: listener.local_addr().expect("bound").port(),
            target: (Ipv4Addr::LOCALHOST, port).into(),
            up: Arc::new(AtomicBool::new(true)),
            ends: Arc::default(),
        };
        cable.serve(listener);
        cable
    }

    /// The server's URL through the cable.
    pub fn url(&self, url: &str) -> String {
        url.replace(&format!(":{}/", self.target.port()), &format!(":{}/", self.port))
    }

    fn serve(&self, listener: TcpListener) {
        let (target, up, ends) = (self.target, Arc::clone(&self.up), Arc::clone(&self.ends));
        listener.set_nonblocking(true).expect("set");
        std::thread::spawn(move || {
            while up.load(Ordering::Acquire) {
                let Ok((client, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                client.set_nonblocking(false).expect("set");
                let Ok(server) = TcpStream::connect(target) else { continue };
                let handle = |socket: &TcpStream| socket.try_clone().expect("a second handle");
                ends.lock().expect("no panic").extend([handle(&client), handle(&server)]);
                for (mut from, mut to) in [(handle(&client), handle(&server)), (server, client)] {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
    }

    /// Cuts it: what is connected ends, who connects is refused.
    pub fn cut(&self) {
        self.up.store(false, Ordering::Release);
        for end in self.ends.lock().expect("no panic").drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
        super::until("the cable is cut", || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err());
    }

    /// Mends it, and leads it to another port.
    pub fn mend_to(&mut self, port: u16) {
        self.target = (Ipv4Addr::LOCALHOST, port).into();
        self.mend();
    }

    /// Mends it.
    pub fn mend(&self) {
        let listener =
            super::eventually("the port is free", || TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).ok());
        self.up.store(true, Ordering::Release);
        self.serve(listener);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.up.store(false, Ordering::Release);
    }
}
